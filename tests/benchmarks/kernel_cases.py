"""What `bench_kernels.py` times: each operation with its inputs, providers, float64 oracle, floor and goals.

Shapes are those of models of 0.1 to 8 B parameters; without a GPU they are small and goals mean nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from kernel_goals import Exact, Faster, Floor, Goal, Smaller, Work
from kernel_peers import (
    cut_cross_entropy,
    flex,
    liger,
    liger_linear_logprob,
    liger_norms_and_rope,
    liger_rope,
    sdpa,
)
from torch import Tensor
from torch.nn.attention import SDPBackend

from lightning_lm import kernels
from lightning_lm.functional import Documents
from lightning_lm.functional.attention import first_visible
from lightning_lm.functional.flash_attention import flash_attention as readable_attention
from lightning_lm.functional.linear_recurrence import linear_recurrence
from lightning_lm.functional.rope import rope_frequencies, rope_table, rotate
from lightning_lm.kernels.recurrence.chunk_scan import scan_chunks
from lightning_lm.kernels.recurrence.flash_linear_attention import run_flash_linear_attention
from lightning_lm.optim.muon import orthogonalize

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16
BOTH = "forward_backward"


@dataclass(frozen=True)
class Case:
    """One operation at one size."""

    name: str
    make: Callable[[], list[Tensor]]
    """Fresh random inputs."""
    providers: dict[str, Callable[..., Any]]
    oracle: Callable[..., Any]
    """The same in torch, for float64."""
    work: Work
    goals: tuple[Goal, ...] = ()
    gradient: bool = True
    slow: bool = False
    """Repeat it less often."""
    unchecked: tuple[str, ...] = ()
    """Providers that compute something else, at the same cost."""


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(DTYPE).requires_grad_()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for the GPU; elsewhere only trace, which shows as much and takes no time."""
    return torch.compile(function, dynamic=False, backend="inductor" if ON_GPU else "aot_eager")


def of_torch(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {"torch": function, "torch_compiled": compiled(function)}


def sizes(on_gpu: tuple[tuple[int, ...], ...], small: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return on_gpu if ON_GPU else (small,)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def norms() -> Iterator[Case]:
    for rows, size in sizes(((32768, 768), (32768, 1024), (32768, 2048), (16384, 4096)), (8, 64)):
        cells, label = rows * size, f"{rows}x{size}"
        made = lambda rows=rows, size=size: [randn(rows, size), randn(size)]  # noqa: E731
        twice = Faster("backward", "liger", 2.0 if size <= 2048 else 1.0)
        yield Case(
            f"rms_norm {label}", made,
            {"ours": kernels.rms_norm, **of_torch(rms_norm), "liger": liger("rms_norm", 1e-6)},
            rms_norm, Work("bytes", 4 * cells, 6 * cells),
            (Floor("forward", 0.85), Floor("backward", 0.8), Faster("forward", "liger", 1.0), twice,
             Faster("forward", "torch_compiled", 1.0), Faster("backward", "torch_compiled", 1.15)),
        )  # fmt: skip
        added = lambda x, r, w: (rms_norm(x + r, w), x + r)  # noqa: E731
        yield Case(
            f"add_rms_norm {label}",
            lambda rows=rows, size=size: [randn(rows, size), randn(rows, size), randn(size)],
            {
                "ours": lambda x, r, w: kernels.rms_norm(x, w, residual=r), **of_torch(added),
                "liger": liger("fused_add_rms_norm", 1e-6),
            },
            added, Work("bytes", 8 * cells, 8 * cells),
            (Floor("forward", 0.85), Floor("backward", 0.8), Faster("forward", "liger", 1.1), twice,
             Faster(BOTH, "torch", 1.5)),
        )  # fmt: skip
        center = lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b)  # noqa: E731
        yield Case(
            f"layer_norm {label}",
            lambda rows=rows, size=size: [randn(rows, size), randn(size), randn(size)],
            {"ours": kernels.layer_norm, **of_torch(center), "liger": liger("layer_norm", 1e-5)},
            center, Work("bytes", 4 * cells, 6 * cells), (Floor("forward", 0.85), Floor("backward", 0.8)),
        )  # fmt: skip


def activations() -> Iterator[Case]:
    units = {
        "swiglu": (kernels.swiglu, lambda gate, up: F.silu(gate) * up, liger("swiglu")),
        "geglu": (
            lambda gate, up: kernels.geglu(gate, up, approximate="tanh"),
            lambda gate, up: F.gelu(gate, approximate="tanh") * up,
            liger("geglu"),
        ),
    }
    for rows, size in sizes(((16384, 2816), (16384, 5632), (16384, 8192)), (8, 96)):
        made = lambda rows=rows, size=size: [randn(rows, size), randn(rows, size)]  # noqa: E731
        work, goals = Work("bytes", 6 * rows * size, 10 * rows * size), (Floor("forward", 0.85),)
        goals += (Floor("backward", 0.85), Faster(BOTH, "liger", 1.1), Faster(BOTH, "torch", 1.6))
        goals += (Faster(BOTH, "torch_compiled", 1.0),)
        for name, (ours, eager, theirs) in units.items():
            providers = {"ours": ours, **of_torch(eager), "liger": theirs}
            yield Case(f"{name} {rows}x{size}", made, providers, eager, work, goals)
        eager = lambda x: F.relu(x).square()  # noqa: E731
        yield Case(
            f"relu_squared {rows}x{size}", lambda made=made: made()[:1],
            {"ours": kernels.relu_squared, **of_torch(eager), "liger": liger("relu_squared")},
            eager, Work("bytes", 4 * rows * size, 6 * rows * size), (Floor("forward", 0.85), Floor("backward", 0.85)),
        )  # fmt: skip


def softmaxes() -> Iterator[Case]:
    for rows, size in sizes(((32768, 2048), (16384, 8192)), (8, 64)):
        eager = lambda x: x.softmax(-1)  # noqa: E731
        yield Case(
            f"softmax {rows}x{size}", lambda rows=rows, size=size: [randn(rows, size)],
            {"ours": kernels.softmax, **of_torch(eager), "liger": liger("softmax")},
            eager, Work("bytes", 4 * rows * size, 6 * rows * size), (Floor("forward", 0.85), Floor("backward", 0.8)),
        )  # fmt: skip


def rotations() -> Iterator[Case]:
    batch, length, heads, kv_heads, dim = (4, 4096, 32, 8, 128) if ON_GPU else (1, 4, 2, 1, 16)
    cos, sin = (part.to(DEVICE) for part in rope_table(rope_frequencies(dim), length))
    cells, label = batch * length * (heads + kv_heads) * dim, f"{batch}x{length}x{heads}+{kv_heads}x{dim}"
    turn = lambda q, k: (rotate(q, cos, sin), rotate(k, cos, sin))  # noqa: E731
    normed = lambda q, k, a, b: turn(rms_norm(q, a), rms_norm(k, b))  # noqa: E731
    made = lambda: [randn(batch, length, heads, dim), randn(batch, length, kv_heads, dim)]  # noqa: E731
    work = Work("bytes", 4 * cells, 4 * cells)
    goals = Floor("forward", 0.75), Floor("backward", 0.75), Faster(BOTH, "liger", 1.5), Faster(BOTH, "torch", 4.0)
    ours = lambda q, k: kernels.rope(q, k, cos, sin)  # noqa: E731
    yield Case(
        f"rope {label}", made, {"ours": ours, **of_torch(turn), "liger": liger_rope(cos, sin)}, turn, work, goals
    )
    yield Case(
        f"qk_norm_rope {label}", lambda: [*made(), randn(dim), randn(dim)],
        {
            "ours": lambda q, k, a, b: kernels.rope(q, k, cos, sin, gains=(a, b)), **of_torch(normed),
            "liger": liger_norms_and_rope(cos, sin),
        },
        normed, Work("bytes", 4 * cells, 6 * cells), goals,
    )  # fmt: skip


def losses() -> Iterator[Case]:
    for rows, vocab in sizes(((8192, 128256), (16384, 50304)), (16, 96)):
        targets = torch.randint(vocab, (rows,), device=DEVICE)
        eager = lambda x, t=targets: F.cross_entropy(x if x.dtype == torch.float64 else x.float(), t, reduction="sum")  # noqa: E731
        yield Case(
            f"cross_entropy {rows}x{vocab}", lambda rows=rows, vocab=vocab: [randn(rows, vocab)],
            {
                "ours": lambda x, t=targets: kernels.cross_entropy(x, t).loss_sum, **of_torch(eager),
                "liger": lambda x, t=targets: liger("cross_entropy", reduction="sum")(x, t),
            },
            eager, Work("bytes", 2 * rows * vocab, 4 * rows * vocab), (Floor("forward", 0.85), Floor("backward", 0.8)),
            slow=True,
        )  # fmt: skip
    for shape in sizes(((4096, 4096, 128256), (16384, 768, 50304)), (16, 32, 96)):
        yield from heads(*shape)


def heads(rows: int, size: int, vocab: int) -> Iterator[Case]:
    targets, label = torch.randint(vocab, (rows,), device=DEVICE), f"{rows}x{size}x{vocab}"
    made = lambda: [randn(rows, size), randn(vocab, size, scale=size**-0.5)]  # noqa: E731
    entropy = lambda h, w, how: F.cross_entropy(wide(h @ w.T), targets, reduction=how)  # noqa: E731
    eager = lambda h, w: entropy(h, w, "sum")  # noqa: E731
    products = rows * size * vocab
    large = vocab > 100_000
    providers = {
        "ours": lambda h, w: kernels.linear_cross_entropy(h, w, targets).loss_sum, **of_torch(eager),
        "liger": lambda h, w: liger("fused_linear_cross_entropy", reduction="sum")(h, w, targets),
        "cut_cross_entropy": cut_cross_entropy(targets, reduction="sum"),
    }  # fmt: skip
    if hasattr(F, "linear_cross_entropy"):
        providers["torch_linear"] = lambda h, w: F.linear_cross_entropy(h, w, targets, reduction="sum")
    goals = (
        Floor(BOTH, 0.9 if large else 0.76), Exact(2, 2.5e-3), Faster(BOTH, "liger", 2.0 if large else 1.8),
        *((Faster(BOTH, "torch", 1.0), Smaller("torch", 1 / 6)) if large else (Faster(BOTH, "torch_compiled", 1.2),)),
    )  # fmt: skip
    work = Work("flops", 2 * products, 4 * products)
    yield Case(f"linear_cross_entropy {label}", made, providers, eager, work, goals, slow=True)
    scores = lambda h, w: -entropy(h, w, "none")  # noqa: E731
    providers = {
        "ours": lambda h, w: kernels.linear_logprob(h, w, targets).logprobs, **of_torch(scores),
        "liger_grpo": liger_linear_logprob(targets),
    }  # fmt: skip
    goals = Floor(BOTH, 0.75), Faster(BOTH, "liger_grpo", 4.0), Faster(BOTH, "torch", 1.0), Smaller("torch", 0.1)
    work = Work("flops", 2 * products, 6 * products)
    yield Case(
        f"linear_logprob {label}", made, providers, scores, work, goals, slow=True, unchecked=("liger_grpo",)
    )  # fmt: skip
    nll = lambda h, w: entropy(h, w, "none")  # noqa: E731
    providers = {
        "ours": lambda h, w: kernels.linear_nll(h, w, targets), **of_torch(nll),
        "liger": lambda h, w: liger("fused_linear_cross_entropy", reduction="sum")(h, w, targets),
        "cut_cross_entropy": cut_cross_entropy(targets, reduction="none"),
    }  # fmt: skip
    goals = Floor("forward", 0.7), Faster("forward", "liger", 1.3), Faster("forward", "torch", 1.3)
    work = Work("flops", 2 * products)
    yield Case(
        f"linear_nll {label}", made, providers, nll, work, (*goals, Smaller("torch", 0.1)), gradient=False, slow=True,
        unchecked=("liger",),
    )  # fmt: skip


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def attentions() -> Iterator[Case]:
    batch, heads, kv_heads, length, dim = (2, 16, 16, 8192, 128) if ON_GPU else (1, 2, 1, 64, 16)
    made = lambda: [randn(batch, n, length, dim) for n in (heads, kv_heads, kv_heads)]  # noqa: E731
    columns = torch.arange(length, device=DEVICE)
    ids = (columns // (length // 8)).expand(batch, -1).contiguous()
    window = length // 8
    documents = Documents.from_ids(ids)
    starts = (columns // (length // 8) * (length // 8)).expand(batch, -1)
    kinds: dict[str, tuple[dict[str, Any], Tensor | None, Any]] = {
        "causal": ({}, None, lambda b, h, i, j: i >= j),
        "packed": ({"mask": documents}, starts, lambda b, h, i, j: (i >= j) & (ids[b, i] == ids[b, j])),
        "window": (
            {"window": window}, first_visible(torch.zeros_like(ids), window),
            lambda b, h, i, j: (i >= j) & (i - j < window),
        ),
    }  # fmt: skip
    for kind, (options, first, visible) in kinds.items():
        first = None if first is None else first.clamp(min=0).int()
        seen = columns + 1 if first is None else columns + 1 - first[0]
        flops = 4 * batch * heads * dim * int(seen.sum())
        mask = None if first is None else (columns[:, None] >= columns) & (columns >= first[:, :, None])
        masked = None if mask is None else mask[:, None]
        torchs = {"torch": sdpa(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, mask=masked)}
        if first is None:
            torchs |= {"sdpa_flash": sdpa(SDPBackend.FLASH_ATTENTION), "sdpa_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION)}
        goals: tuple[Goal, ...] = (Floor("forward", 0.6), Floor("backward", 0.42))
        goals += (Faster("forward", "sdpa_flash", 1.1), Faster("backward", "sdpa_flash", 1.0))
        if first is not None:  # 85 % of what plain causal attention is held to
            goals = Floor("forward", 0.51), Floor("backward", 0.36), Faster(BOTH, "flex", 1.5)
        yield Case(
            f"attention {kind} {batch}x{heads}x{length}x{dim}", made,
            {
                "ours": lambda q, k, v, first=first: kernels.flash_attention(q, k, v, first=first),
                "chosen": lambda q, k, v, options=options: kernels.attention(q, k, v, **options),
                **torchs, "flex": flex(visible, compiled=ON_GPU),
            },
            lambda q, k, v, first=first: readable_attention(q, k, v, first=first, block=512),
            Work("flops", flops, 2.5 * flops), goals, slow=True,
        )  # fmt: skip


def iterations() -> Iterator[Case]:
    for rows, columns in sizes(((768, 3072), (1024, 4096), (2048, 2048), (4096, 4096)), (32, 64)):
        product = kernels.symmetric_product
        ours = lambda x, p=product: orthogonalize(x, dtype=DTYPE, symmetric_product=p)  # noqa: E731
        eager = lambda x: orthogonalize(x, dtype=x.dtype)  # noqa: E731
        flops = 5 * (3 * rows**2 * columns + rows**3)
        goals = (Faster("forward", "torch", 1.25 if rows >= 1024 else 0.98),)
        yield Case(
            f"newton_schulz {rows}x{columns}", lambda rows=rows, columns=columns: [randn(4, rows, columns).detach()],
            {"ours": ours, **of_torch(eager)},
            eager, Work("flops", 4 * flops), goals, gradient=False,
        )  # fmt: skip


def experts() -> Iterator[Case]:
    for number, rows, inner, outer in sizes(((128, 65536, 2048, 768), (32, 65536, 768, 2048)), (4, 24, 16, 32)):
        share = torch.arange(number, dtype=torch.float64)  # the first has no rows, the last twice its share
        counts = (share / share.sum() * rows).long()
        counts[-1] += rows - counts.sum()
        listed, counts = counts.tolist(), counts.to(DEVICE)
        eager = lambda x, w, listed=listed: torch.cat(  # noqa: E731
            [part @ matrix.t() for part, matrix in zip(x.split(listed), w.unbind(), strict=True)]
        )
        ours = lambda x, w, counts=counts: kernels.grouped_linear(x, w, counts)  # noqa: E731
        triton = lambda x, w, counts=counts: kernels.grouped_linear(x, w, counts, prefer_triton=True)  # noqa: E731
        products = rows * inner * outer
        yield Case(
            f"grouped_linear {number}x{rows}x{inner}x{outer}",
            lambda n=number, rows=rows, i=inner, o=outer: [randn(rows, i), randn(n, o, i, scale=i**-0.5)],
            {"ours": ours, "triton": triton, "torch": eager},
            eager, Work("flops", 2 * products, 4 * products), (Floor(BOTH, 0.5), Faster(BOTH, "torch", 1.5)),
        )  # fmt: skip


def recurrences() -> Iterator[Case]:
    batch, length, heads, dim = (2, 8192, 16, 128) if ON_GPU else (1, 96, 2, 16)
    ids = (torch.arange(length, device=DEVICE) // (length // 3)).expand(batch, -1)
    vectors = lambda: [randn(batch, length, heads, dim) for _ in "qkv"]  # noqa: E731
    made = {
        "ssd": lambda: [*vectors(), randn(batch, length, heads)],
        "gated_delta": lambda: [*vectors(), randn(batch, length, heads), randn(batch, length, heads)],
    }

    def of(run: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor | None = None) -> Tensor:
            strength = None if b is None else b.sigmoid()
            given = {"beta": strength, "document_ids": ids, "state": None, **options}
            return run(q * dim**-0.5, F.normalize(k, dim=-1), v, -F.softplus(wide(g)), **given)[0]

        return call

    for kind, inputs in made.items():
        # Pairs inside chunks of 64 tokens, and the state read and written once, for the delta rule corrected too.
        products = batch * heads * length * dim * (2 * 64 + 2 * dim) * (1.5 if kind == "gated_delta" else 1)
        yield Case(
            f"{kind} {batch}x{length}x{heads}x{dim}", inputs,
            {
                "ours": of(linear_recurrence, scan=scan_chunks), "chosen": of(kernels.linear_recurrence),
                "torch": of(linear_recurrence), "flash_linear_attention": of(run_flash_linear_attention),
            },
            of(linear_recurrence), Work("flops", 2 * products, 4 * products),
            (Faster(BOTH, "torch", 2.0), Faster(BOTH, "flash_linear_attention", 0.5)), slow=True,
        )  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield every case, the quick ones first."""
    for family in (norms, activations, softmaxes, rotations, losses, attentions, experts, recurrences, iterations):
        yield from family()

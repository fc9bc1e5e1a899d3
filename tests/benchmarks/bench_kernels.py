"""Time, error and memory of every kernel beside torch, compiled torch, Liger-Kernel and cut-cross-entropy.

Ceilings come first: a large copy and a large product. Then the providers of an operation take turns in one process, in
rounds of fresh random inputs, with the L2 cache overwritten before each repetition; a time is the median of CUDA
events, of the forward pass and of forward and backward with an upstream gradient of a half. Beside it stand the error
against float64 and the peak memory. A provider that fails is a line with its failure. Without a GPU it runs on small
shapes, and times mean nothing: that is to see that it runs.

    python tests/benchmarks/bench_kernels.py --output tests/benchmarks/results/kernels.json
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import write_record
from torch import Tensor

from lightning_lm import kernels
from lightning_lm.functional.rope import rope_frequencies, rope_table, rotate

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16
Case = tuple[Callable[[], list[Tensor]], dict[str, Callable[..., Any]], Callable[..., Any]]


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(DTYPE).requires_grad_()


def total(results: Any) -> Tensor:
    return sum(result.float().sum() for result in (results if isinstance(results, tuple) else (results,)))


def liger(name: str) -> Callable[..., Any]:
    """Return a function of Liger-Kernel, imported when it is first called, so that its absence is a line."""

    def call(*arguments: Any) -> Any:
        import liger_kernel.transformers.functional as functional

        return getattr(functional, name)(*arguments)

    return call


def norms() -> dict[str, Case]:
    cases = {}
    for rows, size in ((32768, 768), (32768, 1024), (32768, 2048), (16384, 4096)) if ON_GPU else ((8, 64),):
        eager = lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6)  # noqa: E731
        providers = {
            "ours": kernels.rms_norm,
            "torch": eager,
            "torch_compiled": torch.compile(eager),
            "liger": lambda x, w: liger("liger_rms_norm")(x, w, 1e-6),
        }
        made = lambda rows=rows, size=size: [randn(rows, size), randn(size)]  # noqa: E731
        cases[f"rms_norm {rows}x{size}"] = (made, providers, eager)
    return cases


def gated_units() -> dict[str, Case]:
    cases = {}
    for rows, size in ((16384, 2816), (16384, 5632), (16384, 8192)) if ON_GPU else ((8, 96),):
        eager = lambda gate, up: F.silu(gate) * up  # noqa: E731
        providers = {
            "ours": kernels.swiglu,
            "torch": eager,
            "torch_compiled": torch.compile(eager),
            "liger": liger("liger_swiglu"),
        }
        made = lambda rows=rows, size=size: [randn(rows, size), randn(rows, size)]  # noqa: E731
        cases[f"swiglu {rows}x{size}"] = (made, providers, eager)
    return cases


def rotations() -> dict[str, Case]:
    batch, length, heads, kv_heads, dim = (4, 4096, 32, 8, 128) if ON_GPU else (1, 4, 2, 1, 16)
    cos, sin = (part.to(DEVICE) for part in rope_table(rope_frequencies(dim), length))
    eager = lambda q, k: (rotate(q, cos, sin), rotate(k, cos, sin))  # noqa: E731
    providers = {
        "ours": lambda q, k: kernels.rope(q, k, cos, sin),
        "torch": eager,
        "torch_compiled": torch.compile(eager),
    }
    made = lambda: [randn(batch, length, heads, dim), randn(batch, length, kv_heads, dim)]  # noqa: E731
    return {f"rope {batch}x{length}x{heads}+{kv_heads}x{dim}": (made, providers, eager)}


def heads() -> dict[str, Case]:
    cases = {}
    for rows, size, vocab in ((4096, 4096, 128256), (16384, 768, 50304)) if ON_GPU else ((16, 32, 96),):
        targets = torch.randint(vocab, (rows,), device=DEVICE)
        eager = lambda h, w, t=targets: F.cross_entropy((h @ w.T).float(), t, reduction="sum")  # noqa: E731
        scores = lambda h, w, t=targets: -F.cross_entropy((h @ w.T).float(), t, reduction="none")  # noqa: E731
        made = lambda n=rows, d=size, v=vocab: [randn(n, d), randn(v, d, scale=d**-0.5)]  # noqa: E731
        cases[f"linear_cross_entropy {rows}x{size}x{vocab}"] = (
            made,
            {
                "ours": lambda h, w, t=targets: kernels.linear_cross_entropy(h, w, t).loss_sum,
                "torch": eager,
                "torch_compiled": torch.compile(eager),
                "liger": lambda h, w, t=targets: liger("liger_fused_linear_cross_entropy")(
                    h, w, t, None, None, -100, 0.0, 0.0, "sum"
                ),
                "cut_cross_entropy": lambda h, w, t=targets: cut_cross_entropy(h, w, t),
            },
            eager,
        )
        cases[f"linear_logprob {rows}x{size}x{vocab}"] = (
            made,
            {"ours": lambda h, w, t=targets: kernels.linear_logprob(h, w, t).logprobs, "torch": scores},
            scores,
        )
    return cases


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, reduction="sum")


def timed(run: Callable[[], Any], repetitions: int) -> float:
    """Return the median milliseconds of a call, with a cold L2 cache."""
    times = []
    spoiler = torch.empty(256 * 2**20 if ON_GPU else 1, dtype=torch.int8, device=DEVICE)
    for _ in range(repetitions):
        spoiler.zero_()
        if not ON_GPU:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def measure(provider: Callable[..., Any], oracle: Callable[..., Any], inputs: list[Tensor], repetitions: int) -> dict:
    """Return times, error of results and gradients over their largest value, and peak memory beyond the inputs."""

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(0.5 * total(provider(*inputs)), inputs)

    grads = both()  # compiles
    with torch.no_grad():
        provider(*inputs)  # compiles without gradients
        forward = timed(lambda: provider(*inputs), repetitions)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if ON_GPU else 0
    backward = timed(both, repetitions)
    found = {"forward_ms": round(forward, 4), "forward_backward_ms": round(backward, 4)}
    if ON_GPU:
        found["peak_mib"] = round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs] if exact_fits(inputs) else []
    if exact:
        expected = torch.autograd.grad(0.5 * total64(oracle(*exact)), exact)
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(grads, expected, strict=True)]
        found["relative_error_of_gradients"] = [float(f"{error:.3g}") for error in errors]
    return found


def total64(results: Any) -> Tensor:
    return sum(result.double().sum() for result in (results if isinstance(results, tuple) else (results,)))


def exact_fits(inputs: list[Tensor]) -> bool:
    """Return whether float64 of everything stays within some tens of GB."""
    return sum(tensor.numel() for tensor in inputs) < 4e8


def ceilings() -> dict[str, float]:
    """Return what the device can copy, and multiply in bfloat16."""
    size = 2**30 if ON_GPU else 2**20
    source, target = (torch.empty(size, dtype=torch.int8, device=DEVICE) for _ in range(2))
    side = 8192 if ON_GPU else 64
    a, b = randn(side, side).detach(), randn(side, side).detach()
    return {
        "copy_tb_per_s": round(2 * size / timed(lambda: target.copy_(source), 10) / 1e9, 3),
        "product_tflop_per_s": round(2 * side**3 / timed(lambda: a @ b, 10) / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=20 if ON_GPU else 2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    kernels.report()
    results: dict[str, Any] = {"ceilings": ceilings()}
    print(results["ceilings"])
    for name, (made, providers, oracle) in {**norms(), **gated_units(), **rotations(), **heads()}.items():
        results[name] = {provider: [] for provider in providers}
        for _ in range(arguments.rounds):
            inputs = made()
            for provider, function in providers.items():
                try:
                    found = measure(function, oracle, inputs, arguments.repetitions)
                except (ImportError, RuntimeError, TypeError, AttributeError) as failure:
                    found = {"failed": f"{type(failure).__name__}: {failure}"[:200]}
                results[name][provider].append(found)
        for provider, rounds in results[name].items():
            print(f"{name:<42}{provider:<18}{rounds[-1]}", flush=True)
    if arguments.output:
        write_record(arguments.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()

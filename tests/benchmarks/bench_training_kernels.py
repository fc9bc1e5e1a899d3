"""A whole training step with and without kernels: tokens per second, MFU and peak memory, in turns in one process.

    python tests/benchmarks/bench_training_kernels.py --output tests/benchmarks/results/training_kernels.json

For models of 124M (vocabulary 50,304) and 0.5B parameters (151,936), six ways to take the same step of 32k tokens:

* ``logits``: plain layers, and the loss from logits that are all there at once; what most trainers do.
* ``default``: plain layers and the loss as this package takes it, from pieces of the logits.
* ``swap``: that loss, and layers exchanged as `KernelSwap` does it.

each eagerly and with compiled layers. All share one set of weights and one optimizer (autocast to bfloat16, gradients
clipped to 1, fused AdamW), so that only what differs takes memory of its own. In each round every one takes its steps,
in an order that turns around, and ratios are taken within a round. Goals: an MFU of 45 % (stretch: 55 %) with swap and
compiled layers. Without a GPU the model is small, layers are only traced, and times mean nothing.
"""

import argparse
import copy
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import write_record
from torch import Tensor, nn
from tqdm import tqdm

from lightning_lm import kernels
from lightning_lm.callbacks.flops import peak_flops_per_s
from lightning_lm.kernels.swap.swap import swap
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig, qwen2
from lightning_lm.models.summary import flops_per_token

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
MODELS = ("124M", "0.5B")
WAYS = ("logits", "default", "swap")
MFU_GOAL, MFU_STRETCH = 0.45, 0.55


@dataclass(frozen=True)
class Shape:
    """A model and what it trains on."""

    config: TransformerConfig
    rows: int
    context: int


def shape_of(name: str) -> Shape:
    layer = Layer(mixer=Attention(num_heads=12), ffn=GLU())
    config = {
        "124M": TransformerConfig(vocab_size=50304, d_model=768, num_layers=12, layers=layer, tie_embeddings=True),
        "0.5B": qwen2("0.5B"),
    }[name]
    if ON_GPU:
        return Shape(replace(config, context_length=2048), rows=16, context=2048)
    small = Layer(mixer=replace(layer_of(config).mixer, num_heads=2, num_kv_heads=1, head_dim=16), ffn=GLU())
    sizes = {"vocab_size": 96, "d_model": 32, "num_layers": 2, "context_length": 32}
    return Shape(replace(config, layers=small, **sizes), rows=2, context=32)


def layer_of(config: TransformerConfig) -> Layer:
    return config.layers if isinstance(config.layers, Layer) else config.layers[0]


def loss_from_logits(model: nn.Module, ids: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
    return F.cross_entropy(model(ids, document_ids=documents).flatten(0, 1).float(), targets.flatten())


def loss_from_pieces(model: Any, ids: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
    found = kernels.linear_cross_entropy(model.hidden(ids, document_ids=documents), model.head.weight, targets)
    return found.loss_sum / found.num_tokens


class Variant:
    """One way to take the step, on weights that all share."""

    def __init__(self, model: nn.Module, way: str, *, compiled: bool) -> None:
        self.model: Any = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
        self.loss: Callable[..., Tensor] = loss_from_logits if way == "logits" else loss_from_pieces
        if way == "swap":
            self.swapped = sum(bool(entry.kernel) for entry in swap(self.model))
        if compiled:
            for layer in self.model.layers:
                layer.compile(backend="inductor" if ON_GPU else "aot_eager")

    def step(self, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor, Tensor | None]) -> float:
        """Train on a batch; return the loss."""
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = self.loss(self.model, *batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()


def made_batch(shape: Shape, *, packed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return inputs, targets and, for packed rows, eight documents a row."""
    tokens = torch.randint(shape.config.vocab_size or 0, (shape.rows, shape.context + 1), device=DEVICE)
    columns = torch.arange(shape.context, device=DEVICE)
    documents = (columns // max(shape.context // 8, 1)).expand(shape.rows, -1).contiguous()
    return tokens[:, :-1], tokens[:, 1:], documents if packed else None


def timed(variant: Variant, optimizer: Any, shape: Shape, *, steps: int, packed: bool) -> dict[str, float]:
    """Return seconds per step of one turn, the loss of its first step, and the peak memory."""
    batches = [made_batch(shape, packed=packed) for _ in range(steps)]
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begin_s = time.perf_counter()
    losses = [variant.step(optimizer, batch) for batch in batches]  # reading the loss waits for the device
    found = {"step_s": (time.perf_counter() - begin_s) / steps, "loss": losses[0]}
    if ON_GPU:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def first_losses(variants: dict[str, Variant], shape: Shape, *, packed: bool) -> dict[str, float | str]:
    """Return the loss of every variant on one batch and the same weights; a variant that cannot do it says why."""
    torch.manual_seed(1)
    batch, found = made_batch(shape, packed=packed), {}
    for name, variant in variants.items():
        try:
            with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                found[name] = round(variant.loss(variant.model, *batch).item(), 5)
        except RuntimeError as failure:
            found[name] = f"failed: {type(failure).__name__}: {failure}"[:200]
    return found


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Let all variants of a model take turns."""
    torch.manual_seed(0)
    shape = shape_of(name)
    model = shape.config.build().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    variants = {
        f"{way}{', compiled' if compiled else ''}": Variant(model, way, compiled=compiled)
        for way in WAYS
        for compiled in (False, True)
    }
    losses = first_losses(variants, shape, packed=arguments.packed)
    turns: dict[str, list[dict[str, float]]] = {one: [] for one in variants}
    failed = {one: loss for one, loss in losses.items() if isinstance(loss, str)}
    order = [*variants]
    for number in tqdm(range(arguments.rounds + 1), desc=name, disable=None, unit="round"):
        for one in order if number % 2 else order[::-1]:
            if one in failed:
                continue
            try:
                found = timed(variants[one], optimizer, shape, steps=arguments.steps, packed=arguments.packed)
            except RuntimeError as failure:  # out of memory, for one
                failed[one] = f"failed: {type(failure).__name__}: {failure}"[:200]
                optimizer.zero_grad()
                continue
            if number:  # the first round warms up and compiles
                turns[one].append(found)
    summaries = summarised(turns, failed, tokens=shape.rows * shape.context)
    add_mfu(summaries, model, shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "tokens_per_step": shape.rows * shape.context, "losses": losses, **summaries}


def summarised(turns: dict[str, list[dict[str, float]]], failed: dict[str, str], *, tokens: int) -> dict[str, Any]:
    """Return medians, and the median ratio to the plain ``logits`` within a round."""
    summaries: dict[str, Any] = {}
    base = [] if "logits" in failed else turns["logits"]
    for one, series in turns.items():
        if one in failed:
            summaries[one] = {"failed": failed[one]}
            continue
        step_s = statistics.median(turn["step_s"] for turn in series)
        summaries[one] = {"step_ms": round(1e3 * step_s, 3), "tokens_per_s": round(tokens / step_s, 1)}
        ratios = [a["step_s"] / b["step_s"] for a, b in zip(base, series, strict=False)]
        if ratios:
            summaries[one] |= {"times_as_fast_as_logits": round(statistics.median(ratios), 3)}
            summaries[one] |= {"range": [round(min(ratios), 3), round(max(ratios), 3)]}
        if "peak_gb" in series[0]:
            summaries[one]["peak_gb"] = round(max(turn["peak_gb"] for turn in series), 2)
    return summaries


def add_mfu(summaries: dict[str, Any], model: Any, shape: Shape) -> None:
    """Add the share of the device's data-sheet peak, and how the best one stands to the goal."""
    peak = peak_flops_per_s(DEVICE, "bf16-mixed")
    for found in summaries.values():
        if peak is not None and "tokens_per_s" in found:
            found["mfu"] = round(found["tokens_per_s"] * flops_per_token(model, shape.context) / peak, 4)
    mfu = summaries["swap, compiled"].get("mfu")
    reached = (
        "not judged" if mfu is None else "stretch" if mfu >= MFU_STRETCH else "pass" if mfu >= MFU_GOAL else "miss"
    )
    summaries["goal"] = {"mfu": MFU_GOAL, "stretch": MFU_STRETCH, "of": "swap, compiled", "verdict": reached}


def table(name: str, found: dict[str, Any]) -> str:
    """Return what is printed for a model."""
    lines = [f"\n{name}: {found['parameters'] / 1e6:.4g} M parameters, {found['tokens_per_step']} tokens a step"]
    lines += [f"  {'':<20}{'step ms':>10}{'tokens/s':>11}{'MFU':>7}{'peak GB':>9}{'x logits':>10}  range"]
    for one in (f"{way}{suffix}" for way in WAYS for suffix in ("", ", compiled")):
        numbers = found[one]
        if "failed" in numbers:
            lines.append(f"  {one:<20}{numbers['failed'][:90]}")
            continue
        mfu = f"{numbers['mfu']:>7.1%}" if "mfu" in numbers else f"{'-':>7}"
        peak = f"{numbers['peak_gb']:>9.2f}" if "peak_gb" in numbers else f"{'-':>9}"
        ratio = f"{numbers.get('times_as_fast_as_logits', float('nan')):>10.2f}"
        spread = " to ".join(f"{number:.2f}" for number in numbers.get("range", []))
        lines.append(
            f"  {one:<20}{numbers['step_ms']:>10.2f}{numbers['tokens_per_s']:>11.0f}{mfu}{peak}{ratio}  {spread}"
        )
    lines.append(f"    goal MFU >= {MFU_GOAL:.0%} with swap and compiled layers  [{found['goal']['verdict']}]")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the record goes; printed only where left out")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rounds", type=int, default=5 if ON_GPU else 2)
    parser.add_argument("--steps", type=int, default=10 if ON_GPU else 1, help="steps of a turn")
    parser.add_argument("--packed", action="store_true", help="eight documents in each row")
    arguments = parser.parse_args()
    # Layers share their code: each way needs room for its own, and none may fall back to eager unseen.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    kernels.report()
    if not ON_GPU:
        print("No GPU: a dry run in small; times mean nothing.")
    results: dict[str, Any] = {} if ON_GPU else {"dry_run": True}
    for name in arguments.models:
        results[name] = run(name, arguments)
        print(table(name, results[name]), flush=True)
        if ON_GPU:
            torch.cuda.empty_cache()
        if arguments.output:  # after each model: a run that is cut keeps the first
            write_record(arguments.output, command=shlex.join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()

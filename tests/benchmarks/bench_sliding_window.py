"""A sliding window of 256 keys over 4,096 tokens, against full causal attention and against a mask.

    python tests/benchmarks/bench_sliding_window.py --output tests/benchmarks/results/sliding_window.json

The three take turns; CPU-seconds of this process are compared, minima and medians of the ratio within a round.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from record import write_record
from torch import Tensor

from lightning_lm.functional.attention import causal_attention

HEADS, HEAD_DIM = 6, 64


def masked(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Hide what lies outside the window with a length x length mask."""
    places = torch.arange(query.size(2))
    distance = places[:, None] - places
    return F.scaled_dot_product_attention(query, key, value, (distance >= 0) & (distance < window))


def measure(length: int, window: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time the three ways in turns, forward alone and with the backward pass."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, length, HEADS, HEAD_DIM)
    inputs = [torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for _ in range(3)]
    upstream = torch.randn(shape, generator=generator).transpose(1, 2)
    ways: dict[str, Callable[[], Tensor]] = {
        "window": lambda: causal_attention(*inputs, window=window),
        "full": lambda: causal_attention(*inputs),
        "mask": lambda: masked(*inputs, window),
    }
    torch.testing.assert_close(ways["window"](), ways["mask"](), atol=1e-5, rtol=0)
    times: dict[str, list[float]] = {f"{way} {part}": [] for way in ways for part in ("forward", "both")}
    for _ in range(rounds):
        for name, way in ways.items():
            with torch.no_grad():
                times[f"{name} forward"].append(_seconds(way))
            times[f"{name} both"].append(_seconds(lambda way=way: torch.autograd.grad(way(), inputs, upstream)))
    return {
        name: {
            "best_cpu_ms": round(min(series) * 1e3, 2),
            "times_of_window_median": round(
                statistics.median(a / b for a, b in zip(series, times[f"window {name.split()[1]}"], strict=True)), 3
            ),
        }
        for name, series in times.items()
    }


def _seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where the record goes; printed only where left out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(args.length, args.window, args.rounds)
    for name, numbers in results.items():
        print(f"{name:16s} {numbers}")
    if args.output:
        setting = {"length": args.length, "window": args.window, "heads": HEADS, "head_dim": HEAD_DIM}
        command = shlex.join(["python", *sys.argv])
        write_record(args.output, command=command, results={**setting, "rounds": args.rounds, **results})


if __name__ == "__main__":
    main()

"""A step of Muon beside torch's, and orthogonalisation in the space of the Gram matrix beside the plain iteration.

They take turns in one process and one thread; what counts is CPU time, its minimum and the median of paired ratios. The
matrices are those of 6 Llama layers of width 384.

    python tests/benchmarks/bench_muon.py --output tests/benchmarks/results/muon.json
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from record import cpu_seconds, write_record

from lightning_lm.optim import MuonOptimizer
from lightning_lm.optim.muon import _iterate, _iterate_gram

LAYER = [(384, 384)] * 4 + [(1024, 384)] * 2 + [(384, 1024)]


def matrices() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(*shape, generator=generator).requires_grad_() for shape in LAYER * 6]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def paired(candidates: dict[str, Callable[[], object]], rounds: int, reference: str) -> dict[str, dict[str, float]]:
    times = cpu_seconds(candidates, lambda name: candidates[name](), rounds)
    return {
        name: {
            "best_cpu_s": round(min(seconds), 4),
            f"median_ratio_to_{reference}": round(
                statistics.median(a / b for a, b in zip(seconds, times[reference], strict=True)), 3
            ),
        }
        for name, seconds in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = {"ours": MuonOptimizer(matrices()).step, "torch": torch.optim.Muon(matrices()).step}
    results: dict[str, object] = {"step": paired(steps, arguments.rounds, "torch")}
    for shape in ((24, 384, 384), (12, 256, 704), (18, 384, 1024), (8, 256, 1024)):
        stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        stack /= stack.norm(dim=(-2, -1), keepdim=True)
        half = stack.bfloat16()
        candidates = {
            "plain": lambda stack=stack: [_iterate(matrix, 5) for matrix in stack],
            "gram": lambda stack=stack: [_iterate_gram(matrix, 5) for matrix in stack],
            "plain_bfloat16": lambda stack=half: [_iterate(matrix, 5) for matrix in stack],
        }
        results["x".join(map(str, shape))] = paired(candidates, arguments.rounds, "plain")
    for name, row in results.items():
        print(name, row)
    if arguments.output:
        write_record(arguments.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()

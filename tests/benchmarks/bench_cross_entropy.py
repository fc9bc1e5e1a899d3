"""Forward and backward of the output layer: our chunks, torch's chunks, and matmul with `F.cross_entropy`.

They take turns in one process and one thread; what counts is CPU time, its minimum and the median of paired ratios.

    python tests/benchmarks/bench_cross_entropy.py --output tests/benchmarks/results/cross_entropy.json
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from record import write_record
from torch import Tensor

from lightning_lm.kernels import linear_cross_entropy

ROWS, D_MODEL, VOCAB = 4096, 384, 8192


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets).loss_sum


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


CANDIDATES = {"ours": ours, "torch_chunked": torch_chunked, "matmul_and_cross_entropy": all_logits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, D_MODEL, generator=generator)
    weight = 0.02 * torch.randn(VOCAB, D_MODEL, generator=generator)
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for _ in range(arguments.rounds):
        for name, loss in CANDIDATES.items():
            inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            start = time.process_time()
            loss(*inputs, targets).backward()
            times[name].append(time.process_time() - start)
    results = {"rows": ROWS, "d_model": D_MODEL, "vocab": VOCAB}
    for name, seconds in times.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, times["matmul_and_cross_entropy"], strict=True)]
        results[name] = {
            "best_cpu_s": round(min(seconds), 4),
            "median_ratio_to_matmul_and_cross_entropy": round(statistics.median(ratios), 3),
        }
        print(name, results[name])
    if arguments.output:
        write_record(arguments.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()

"""Forward and backward of the output layer: our chunks, torch's chunks, and matmul with `F.cross_entropy`.

For each vocabulary they take turns in one process and one thread; what counts is CPU time, its minimum and the median
of paired ratios. torch's chunks are left out above 32k ids, where they take minutes. Memory is the growth of the
resident set of a process of its own, beyond the inputs.

    python tests/benchmarks/bench_cross_entropy.py --output tests/benchmarks/results/cross_entropy.json
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from record import cpu_seconds, write_record
from torch import Tensor

from lightning_lm.kernels import linear_cross_entropy

D_MODEL = 384
LARGEST_OF_TORCH_CHUNKED = 32768
ROWS = {8192: 4096, 32768: 2048, 131072: 512, 262144: 512}
"""Of each vocabulary."""


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets).loss_sum


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


CANDIDATES = {"ours": ours, "torch_chunked": torch_chunked, "matmul_and_cross_entropy": all_logits}


def candidates(vocab: int) -> list[str]:
    return [name for name in CANDIDATES if name != "torch_chunked" or vocab <= LARGEST_OF_TORCH_CHUNKED]


def problem(vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS[vocab], D_MODEL, generator=generator)
    weight = (0.02 * torch.randn(vocab, D_MODEL, generator=generator)).requires_grad_()
    return hidden.requires_grad_(), weight, torch.randint(vocab, (ROWS[vocab],), generator=generator)


def step(name: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    CANDIDATES[name](hidden, weight, targets).backward()
    hidden.grad = weight.grad = None


def seconds(vocab: int, rounds: int) -> dict[str, list[float]]:
    inputs = problem(vocab)
    return cpu_seconds(candidates(vocab), lambda name: step(name, *inputs), rounds)


def grown_mib(name: str, vocab: int) -> float:
    """Return what this process grows by in one step; asked of a new one."""
    inputs = problem(vocab)
    CANDIDATES[name](inputs[0][:8, :8], inputs[1][:8, :8], inputs[2][:8] % 8).backward()  # what is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = peak_kib()
    step(name, *inputs)
    return (peak_kib() - before) / 1024


def peak_kib() -> int:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def peak_mib(name: str, vocab: int) -> float:
    command = [sys.executable, __file__, "--memory-of", name, "--vocab", str(vocab)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(vocab: int, rounds: int) -> dict:
    times = seconds(vocab, rounds)
    memory = {name: peak_mib(name, vocab) for name in times}
    plain = "matmul_and_cross_entropy"
    return {"rows": ROWS[vocab], "d_model": D_MODEL} | {
        name: {
            "best_cpu_s": round(min(mine), 4),
            "median_ratio_to_matmul_and_cross_entropy": round(
                statistics.median(a / b for a, b in zip(mine, times[plain], strict=True)), 3
            ),
            "peak_mib": round(memory[name]),
            "memory_ratio_to_matmul_and_cross_entropy": round(memory[name] / memory[plain], 3),
        }
        for name, mine in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--vocab", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--memory-of", choices=CANDIDATES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        print(grown_mib(arguments.memory_of, *arguments.vocab))
        return
    results = {}
    for vocab in arguments.vocab:
        results[f"vocabulary {vocab}"] = measure(vocab, arguments.rounds)
        print(vocab, results[f"vocabulary {vocab}"], flush=True)
    if arguments.output:
        write_record(arguments.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()

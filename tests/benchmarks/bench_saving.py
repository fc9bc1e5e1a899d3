"""Saving 110 million parameters with AdamW's state: seconds and memory beside ``torch.save`` and an fsync.

    python tests/benchmarks/bench_saving.py --output tests/benchmarks/results/saving.json

The ways take turns, each round in a new order, so that a disk or a neighbour that is slow for a while is slow for all;
seconds are medians and minima of the rounds. Memory is what the process's peak grows by while one way saves once, in a
process of its own; ``VmHWM`` does not count the page cache.
"""

import argparse
import functools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from record import write_record

from lightning_lm.models import GLU, Attention, Layer, TransformerConfig
from lightning_lm.modules.checkpoint_files import save_to_files
from lightning_lm.strategies import AtomicCheckpointIO

BARE = "torch.save and fsync"


def bare(content: dict, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


@functools.cache
def plain_trainer() -> Trainer:
    """Return a Trainer that a module of this package has met."""
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    save_to_files(trainer)
    return trainer


def stock(content: dict, path: Path) -> None:
    TorchCheckpointIO().save_checkpoint(content, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


WAYS: dict[str, Callable[[dict, Path], None]] = {
    BARE: bare,
    "AtomicCheckpointIO": lambda content, path: AtomicCheckpointIO().save_checkpoint(content, path),
    "a plain Trainer with a module of this package": lambda content, path: plain_trainer().strategy.save_checkpoint(
        content, path
    ),
    "Lightning's TorchCheckpointIO and fsync": stock,
}


def checkpoint() -> dict:
    layers = Layer(mixer=Attention(num_heads=12), ffn=GLU())
    config = TransformerConfig(vocab_size=32_000, d_model=768, num_layers=12, layers=layers, tie_embeddings=True)
    model = config.build()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": 1}


def peak_mb() -> float:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("VmHWM")) / 1024


def memory_mb(way: str) -> float:
    command = [sys.executable, __file__, "--memory-of", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    content = checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.ckpt"
        for way in WAYS.values():
            way({"a": torch.ones(1)}, path)  # imports
        if arguments.memory_of:
            before = peak_mb()
            WAYS[arguments.memory_of](content, path)
            print(peak_mb() - before)
            return
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for number in range(arguments.rounds):
            for name in random.Random(number).sample(list(WAYS), len(WAYS)):
                path.unlink(missing_ok=True)
                begin = time.monotonic()
                WAYS[name](content, path)
                seconds[name].append(time.monotonic() - begin)
            size = path.stat().st_size / 1e6
    results = {"parameters": sum(t.numel() for t in content["state_dict"].values()), "file, MB": round(size, 1)}
    for name, values in seconds.items():
        results[name] = {
            "median, s": round(statistics.median(values), 3),
            "min, s": round(min(values), 3),
            "median of the ratio in a round": round(
                statistics.median(own / base for own, base in zip(values, seconds[BARE], strict=True)), 3
            ),
            "peak memory grows by, MB": round(memory_mb(name), 1),
        }
        print(name, results[name], flush=True)
    if arguments.output is not None:
        write_record(arguments.output, command=f"python {' '.join(sys.argv)}", results=results)


if __name__ == "__main__":
    main()

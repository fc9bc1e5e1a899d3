"""What a training loop costs per step over plain PyTorch, on a model so small that nothing else matters.

Every loop trains the same model (about 27,000 parameters) on the same batches with the same loss, AdamW and clipping,
in one process and one thread. They take turns. Bars and logs behave as in a terminal. Start-up and the end of a fit lie
outside the measured steps; the threads of loggers and bars lie inside the CPU time.

    python tests/benchmarks/bench_trainer_overhead.py --output tests/benchmarks/results/trainer_overhead.json
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FORCE_COLOR"] = "1"  # rich: behave as in a terminal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from record import write_record
from torch import nn

from lightning_lm.callbacks import (
    CompressionReport,
    LastCheckpoint,
    LMProgressBar,
    LMSummary,
    Perplexity,
    SampleText,
    Throughput,
)
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.modules.token_losses import CrossEntropy
from lightning_lm.optim import AdamW, Constant

CONFIG = TransformerConfig(
    vocab_size=256, d_model=32, num_layers=1, layers=Layer(mixer=Attention(num_heads=2), ffn=GLU(hidden_size=64))
)
LEARNING_RATE, CLIP = 1e-3, 1.0
WARMUP_STEPS = 100
BLOCK_STEPS = 50
LOSS = CrossEntropy()


class Batches:
    """The same batches for every loop; notes when each is fetched."""

    def __init__(self, num_steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._ids = [torch.randint(256, (4, 33), generator=generator) for _ in range(64)]
        self._num_steps = num_steps
        self.dataset = range(num_steps)
        self.fetched: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.fetched.clear()
        for step in range(self._num_steps):
            self.fetched.append((time.perf_counter(), time.process_time()))
            ids = self._ids[step % len(self._ids)]
            yield {"input_ids": ids, "labels": ids}

    def times(self) -> "Times":
        """Return what a step took, after the first ones."""
        wall, cpu = zip(*self.fetched[WARMUP_STEPS:], strict=True)
        blocks = [later - sooner for sooner, later in zip(cpu, cpu[BLOCK_STEPS:], strict=False)]
        return Times(
            median_wall_ms=1e3 * statistics.median(later - sooner for sooner, later in itertools.pairwise(wall)),
            median_cpu_ms=1e3 * statistics.median(later - sooner for sooner, later in itertools.pairwise(cpu)),
            mean_cpu_ms=1e3 * (cpu[-1] - cpu[0]) / (len(cpu) - 1),
            best_block_cpu_ms=1e3 * min(blocks) / BLOCK_STEPS,
        )


class Times(NamedTuple):
    """A step in milliseconds; the median leaves out the steps that log, the mean and the blocks of steps do not."""

    median_wall_ms: float
    median_cpu_ms: float
    mean_cpu_ms: float
    best_block_cpu_ms: float


class Tokens(LightningDataModule):
    """A datamodule around the batches, with a byte tokenizer's interface."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self._batches = batches
        self.context_length = 32

    def train_dataloader(self) -> Batches:
        return self._batches


class BareModule(LightningModule):
    """What a user of Lightning writes; ``logs`` is what the tutorials show."""

    def __init__(self, logs: bool) -> None:
        super().__init__()
        self.model = build_model()
        self._logs = logs

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        sums = LOSS(self.model, batch)
        loss = sums.loss_sum / sums.num_tokens
        if self._logs:
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return CONFIG.build()


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def plain(batches: Batches, folder: str) -> None:
    model = build_model()
    optimizer = build_optimizer(model)
    for batch in batches:
        sums = LOSS(model, batch)
        (sums.loss_sum / sums.num_tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def ours(batches: Batches, folder: str, callbacks: bool = True) -> None:
    torch.manual_seed(0)
    module = PretrainModule(CONFIG, optimizer=AdamW(lr=LEARNING_RATE), schedule=Constant())
    ours = [Perplexity(), Throughput(peak_flops_per_s=1e12), LMSummary(), LMProgressBar(), CompressionReport()]
    ours += [SampleText(tokenizer=OneByte()), LastCheckpoint(every_n_train_steps=10_000)]
    options = {} if callbacks else {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=ours if callbacks else None,
        log_every_n_steps=10,
        gradient_clip_val=CLIP,
        default_root_dir=folder,
        enable_checkpointing=callbacks,
        **options,
    ).fit(module, datamodule=Tokens(batches))


def ours_without_callbacks(batches: Batches, folder: str) -> None:
    ours(batches, folder, callbacks=False)


def lightning_defaults(batches: Batches, folder: str, every: int = 50) -> None:
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", gradient_clip_val=CLIP, default_root_dir=folder, log_every_n_steps=every
    )
    trainer.fit(BareModule(logs=True), batches)


def lightning_defaults_every_10(batches: Batches, folder: str) -> None:
    lightning_defaults(batches, folder, every=10)


def lightning_nothing(batches: Batches, folder: str) -> None:
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        gradient_clip_val=CLIP,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(BareModule(logs=False), batches)


def transformers_trainer(batches: Batches, folder: str) -> None:
    if not all(importlib.util.find_spec(name) for name in ("transformers", "accelerate")):
        raise SystemExit("The peer is missing: pip install transformers accelerate, or leave it out with --loops.")
    import transformers

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model()

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            sums = LOSS(self.model, {"input_ids": input_ids, "labels": labels})
            return {"loss": sums.loss_sum / sums.num_tokens}

    class WithBatches(transformers.Trainer):
        def get_train_dataloader(self) -> Batches:
            return batches

    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=len(batches),
        logging_steps=10,
        report_to=["tensorboard"],
        save_strategy="no",
        optim="adamw_torch_fused",
        learning_rate=LEARNING_RATE,
        max_grad_norm=CLIP,
        use_cpu=True,
    )
    WithBatches(Wrapped(), arguments, train_dataset=batches.dataset).train()


class OneByte:
    """Just enough of a tokenizer to sample text."""

    eos_id = None
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


LOOPS: dict[str, Callable[[Batches, str], None]] = {
    "plain": plain,
    "ours": ours,
    "ours_without_callbacks": ours_without_callbacks,
    "lightning_nothing": lightning_nothing,
    "lightning_defaults_every_50": lightning_defaults,
    "lightning_defaults_every_10": lightning_defaults_every_10,
    "transformers": transformers_trainer,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Write bars and warnings to nowhere: what they draw is paid for, not shown."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def measure(name: str, num_steps: int) -> Times:
    batches = Batches(num_steps)
    with tempfile.TemporaryDirectory() as folder, quiet():
        LOOPS[name](batches, folder)
    return batches.times()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    rounds: list[dict[str, Times]] = []
    for number in range(arguments.rounds):
        rounds.append({})
        for name in arguments.loops:
            rounds[-1][name] = measure(name, arguments.steps)
            print(f"round {number}  {name:28}", *(f"{k} {v:.3f}" for k, v in rounds[-1][name]._asdict().items()))
            sys.stdout.flush()
    results = {"parameters": sum(p.numel() for p in build_model().parameters()), "loops": summarize(rounds)}
    print(json.dumps(results, indent=2))
    if arguments.output:
        write_record(arguments.output, command=" ".join(["python", *sys.argv]), results=results)


def summarize(rounds: list[dict[str, Times]]) -> dict[str, dict[str, float]]:
    """Return each loop's best times, and how much they and the median round lie over the plain loop."""
    results = {}
    for name in rounds[0]:
        best = {field: min(getattr(times[name], field) for times in rounds) for field in Times._fields}
        plain = {field: min(getattr(times["plain"], field) for times in rounds) for field in Times._fields}
        paired = {
            field: statistics.median(getattr(times[name], field) / getattr(times["plain"], field) for times in rounds)
            for field in Times._fields
        }
        results[name] = {field: round(value, 3) for field, value in best.items()}
        results[name] |= {f"{field}_over_plain": round(best[field] - plain[field], 3) for field in best}
        results[name] |= {f"{field}_median_paired_ratio": round(value, 3) for field, value in paired.items()}
    return results


if __name__ == "__main__":
    main()

"""Tokens per second, model FLOPs utilisation, step time and peak memory, at no cost between logging intervals."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_lm.callbacks.batches import context_of, num_predictions
from lightning_lm.callbacks.flops import peak_flops_per_s, training_flops_per_token
from lightning_lm.callbacks.hooks import LeanHooks, LogInterval, emit
from lightning_lm.distributed import data_ranks
from lightning_lm.parts import Limit, check_numbers

__all__ = ["Throughput"]


class Throughput(LeanHooks, Callback):
    """Log ``perf/tokens_per_s``, ``perf/step_time_s``, ``perf/memory_gb`` and ``perf/mfu`` every ``log_every_n_steps``.

    Between two logs only shapes are read and two integers added, without device synchronisation. The logged value is
    the mean since the last log, over whole optimizer steps; time in validation and in `SampleText` is excluded, and so
    is the first step of a run, which compiles and allocates.

    * ``perf/tokens_per_s``: positions that predict a token, padding included, over all devices;
      ``perf/tokens_per_s_per_device`` only where there are several. Neither where batches have no tokens: a mapping
      with ``input_ids`` [batch, seq], or a pair of inputs and targets of that shape, has.
    * ``perf/step_time_s``: seconds per optimizer step.
    * ``perf/memory_gb``: 10^9 bytes, the most that this rank held so far: allocated on its GPU, resident on a CPU.
    * ``perf/mfu``: FLOPs of the model as counted from its matrices, forward and backward, over the device's dense peak
      (data sheet) in the trainer's precision. Recomputed activations count nothing. Only where the peak is known.

    Args:
        flops_per_token: Training FLOPs per token; by default counted from the parts of a model of this
            package, by running one row of the first batch through any other module.
        peak_flops_per_s: Peak of one device, FLOP/s; by default from a table of known GPUs.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import Throughput
        >>> trainer = Trainer(callbacks=[Throughput()], log_every_n_steps=10, logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, flops_per_token: float | None = None, peak_flops_per_s: float | None = None) -> None:
        given = {"flops_per_token": flops_per_token, "peak_flops_per_s": peak_flops_per_s}
        check_numbers(dict.fromkeys(given, Limit.POSITIVE), given)
        self._given_flops = flops_per_token
        self._given_peak = peak_flops_per_s
        self._flops_per_token = flops_per_token
        self._peak = peak_flops_per_s
        self._interval = LogInterval()
        self._tokens = 0
        self._start_s: float | None = None
        self._start_step = 0
        self._paused_s: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the device and forget an earlier run."""
        self._peak = self._given_peak or peak_flops_per_s(trainer.strategy.root_device, str(trainer.precision))
        self._flops_per_token = self._given_flops
        self._interval.reset(trainer)
        self._start_s = self._paused_s = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave out a validation that has just ended; count FLOPs once."""
        if self._paused_s is not None:
            if self._start_s is not None:
                self._start_s += time.perf_counter() - self._paused_s
            self._paused_s = None
        if self._peak is not None and self._flops_per_token is None and num_predictions(batch):
            self._flops_per_token = training_flops_per_token(pl_module, context_of(batch)) or 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch; log if it ends an interval."""
        self._tokens += num_predictions(batch)
        if not self._interval.stepped(trainer):
            return
        if self._start_s is None:
            self._restart(trainer)
        elif self._interval.ends(trainer):
            self._log(trainer)
            self._restart(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused_s = time.perf_counter()

    @contextmanager
    def clock_stopped(self, trainer: Trainer) -> Iterator[None]:
        """Leave out what another callback does between two steps, such as sampling a text."""
        if self._paused_s is None:
            _wait_for(trainer.strategy.root_device)
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            if self._start_s is not None and self._paused_s is None:  # else it is part of a validation's pause
                self._start_s += time.perf_counter() - begin_s

    def _restart(self, trainer: Trainer) -> None:
        _wait_for(trainer.strategy.root_device)
        self._start_s = time.perf_counter()
        self._start_step = self._interval.step
        self._tokens = 0

    def _log(self, trainer: Trainer) -> None:
        _wait_for(trainer.strategy.root_device)
        elapsed_s = time.perf_counter() - (self._start_s or 0.0)
        tokens_per_s = _over_ranks(trainer, self._tokens) / elapsed_s
        per_device = tokens_per_s / trainer.world_size
        metrics = {"perf/tokens_per_s": tokens_per_s} if tokens_per_s else {}
        if metrics and trainer.world_size > 1:
            metrics["perf/tokens_per_s_per_device"] = per_device
        metrics["perf/step_time_s"] = elapsed_s / (self._interval.step - self._start_step)
        memory = _peak_memory_bytes(trainer.strategy.root_device)
        if memory is not None:
            metrics["perf/memory_gb"] = memory / 1e9
        if tokens_per_s and self._peak is not None and self._flops_per_token:
            metrics["perf/mfu"] = per_device * self._flops_per_token / self._peak
        emit(trainer, metrics)


def _over_ranks(trainer: Trainer, tokens: int) -> float:
    """Sum over ranks; what several ranks read together counts once."""
    if trainer.world_size == 1:
        return float(tokens)
    local = torch.tensor(tokens, dtype=torch.int64, device=trainer.strategy.root_device)
    total = int(trainer.strategy.reduce(local, reduce_op="sum"))
    return total * data_ranks(trainer) / trainer.world_size


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""Training memory of each device: predicted before training starts, counted after the first step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import rich
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from lightning_lm.callbacks.hooks import LeanHooks
from lightning_lm.callbacks.memory_parts import (
    SavedActivations,
    bucket_bytes,
    capacity_bytes,
    measured_memory,
    predicted_memory,
)
from lightning_lm.errors import ConfigurationError
from lightning_lm.models.summary import MemoryEstimate, readable_bytes

__all__ = ["MemoryReport"]

_LABELS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "activations": "activations",
}
_ADVICE = {
    "parameters": "shard the parameters over more devices (strategy fsdp or tensor_parallel), or a smaller model",
    "gradients": "strategy zero2, which keeps 1 / devices of the gradients and of the optimizer states",
    "optimizer_states": "strategy zero1 on more devices, which keeps 1 / devices of the optimizer states",
    "activations": "a smaller micro-batch (raise accumulate_grad_batches) or activation_checkpointing: blocks",
}


class MemoryReport(LeanHooks, Callback):
    """Print what parameters, gradients, optimizer states and activations take on a rank; refuse what cannot fit.

    Before the first step the numbers are predicted, the first three exactly: they follow from the parameters as the
    strategy has laid them out, the optimizer and the strategy. Activations are an estimate for a micro-batch of the
    datamodule, and gathered shards, communication and the device's own needs are not in it. After the first step all
    four are counted from the tensors that are there, which is what the table shows beside the prediction.

    Args:
        capacity_gib: Memory of a device, in GiB; by default the device is asked (a CPU's memory is shared by the
            ranks of a machine).
        refuse: Raise an error before the first step if the run cannot fit.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import MemoryReport
        >>> trainer = Trainer(callbacks=[MemoryReport()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, capacity_gib: float | None = None, refuse: bool = True) -> None:
        self._capacity = None if capacity_gib is None else round(capacity_gib * 2**30)
        self._refuse = refuse
        self._saved: SavedActivations | None = None
        self._gradients = 0
        self._first_step = 0
        self.predicted: MemoryEstimate | None = None
        """Predicted memory of this rank, set at the start of training."""
        self.measured: MemoryEstimate | None = None
        """Measured memory of this rank, set at the end of the first step."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict, and compare with the device.

        Raises:
            ConfigurationError: If a rank would need more than its device has.
        """
        self._first_step = trainer.global_step
        self.predicted, self.measured, self._saved = predicted_memory(trainer, pl_module), None, None
        capacity = self._capacity or capacity_bytes(trainer)
        needed = self.predicted.total + bucket_bytes(trainer)
        fits = capacity is None or needed <= capacity
        if self._refuse and not trainer.strategy.reduce_boolean_decision(fits, all=True):
            raise ConfigurationError(_refusal(self.predicted, needed, capacity, trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count from the first forward pass what it keeps."""
        if self._saved is None:
            self._saved = SavedActivations(pl_module)
            self._saved.start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop counting what is kept."""
        if self._saved is not None:
            self._saved.stop()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Count the gradients of the first step while they are there."""
        if self.measured is None:
            self._gradients = measured_memory(trainer, pl_module, activations=0).gradients

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the rest after the first step, and print the table on rank 0."""
        if self.measured is not None or self._saved is None or self.predicted is None:
            return
        self._saved.stop()  # a step without a loss has no backward pass
        if trainer.global_step == self._first_step:
            return
        counted = measured_memory(trainer, pl_module, activations=self._saved.num_bytes)
        self.measured = dataclasses.replace(counted, gradients=self._gradients)
        if trainer.is_global_zero:
            rich.get_console().print(_table(self.predicted, self.measured, trainer))


def _table(predicted: MemoryEstimate, measured: MemoryEstimate, trainer: Trainer) -> Table:
    device = trainer.strategy.root_device
    caption = None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        caption = f"most allocated so far: {readable_bytes(peak)} of {readable_bytes(capacity_bytes(trainer) or 0)}"
    table = Table(title=f"Memory of rank 0 of {trainer.world_size}", caption=caption)
    table.add_column("what")
    table.add_column("predicted", justify="right")
    table.add_column("counted", justify="right")
    for name, label in _LABELS.items():
        sizes = [getattr(memory, name) for memory in (predicted, measured)]
        unknown = name == "activations" and not sizes[0]  # the length of a row is not known before the first batch
        table.add_row(label, "-" if unknown else readable_bytes(sizes[0]), readable_bytes(sizes[1]))
    if bucket_bytes(trainer):
        table.add_row("buckets of DDP", readable_bytes(bucket_bytes(trainer)), "")
    table.add_row("all", readable_bytes(predicted.total), readable_bytes(measured.total), style="bold")
    return table


def _refusal(predicted: MemoryEstimate, needed: int, capacity: int | None, trainer: Trainer) -> str:
    if capacity is None or needed <= capacity:
        return "Training does not fit the device of another rank; its own message says what it needs."
    sizes: Mapping[str, int] = {name: getattr(predicted, name) for name in _LABELS}
    parts = ", ".join(f"{_LABELS[name]} {readable_bytes(size)}" for name, size in sizes.items())
    buckets = bucket_bytes(trainer)
    if buckets:
        parts += f", buckets of DDP {readable_bytes(buckets)} (none with DDPStrategy(gradient_as_bucket_view=True))"
    largest = sorted(sizes, key=lambda name: -sizes[name])[:2]
    advice = "\n".join(f"  * {_ADVICE[name]}" for name in largest)
    return (
        f"Training needs about {readable_bytes(needed)} on each device, which has {readable_bytes(capacity)}.\n"
        f"  Needed: {parts}.\n"
        f"What helps most:\n{advice}\n"
        "MemoryReport(refuse=False) trains all the same."
    )

"""Training memory of each device: predicted before training starts, counted after the first step."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import rich
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_lm.callbacks.batches import row_length, rows_per_device
from lightning_lm.callbacks.hooks import LeanHooks
from lightning_lm.errors import ConfigurationError
from lightning_lm.models.summary import MemoryEstimate, cast_bytes, memory_estimate, readable_bytes
from lightning_lm.modules.activation_checkpointing import blocks_of
from lightning_lm.modules.gradient_normalization import held_gradients
from lightning_lm.optim.memory import predicted_state_bytes, tensors_in
from lightning_lm.parts import Limit, check_numbers

__all__ = ["MemoryReport", "SavedActivations", "bucket_bytes", "capacity_bytes", "measured_memory", "predicted_memory"]

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
    """Print the memory of parameters, gradients, optimizer states and activations; refuse runs that cannot fit.

    Before the first step the sizes are predicted, the first three exactly, from the parameters as the strategy has
    sharded them and the optimizer. Activations are an estimate for a micro-batch of the datamodule, without gathered
    shards, communication buffers and the device's own overhead. After the first step all four are measured from the
    tensors in memory, and the table shows both.

    Args:
        capacity_gib: Memory of a device, in GiB; by default that of the hardware (a CPU's memory is divided by the
            ranks of a machine).
        refuse: Raise an error before the first step if the run cannot fit.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import MemoryReport
        >>> trainer = Trainer(callbacks=[MemoryReport()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, capacity_gib: float | None = None, refuse: bool = True) -> None:
        check_numbers({"capacity_gib": Limit.POSITIVE}, {"capacity_gib": capacity_gib})
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
        self._first_step, self._gradients = trainer.global_step, 0
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

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the gradients that micro-batches of the first step add up to."""
        if self.measured is None:
            added = _bytes(param.grad for param in pl_module.parameters() if param.grad is not None)
            self._gradients = max(self._gradients, added)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Count the gradients of the first step that are there after their reduction."""
        if self.measured is None:
            held = measured_memory(trainer, pl_module, activations=0).gradients
            self._gradients = max(self._gradients, held)

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


_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def predicted_memory(trainer: Trainer, pl_module: LightningModule, *, tokens: int | None = None) -> MemoryEstimate:
    """Return what this rank will hold, once the strategy has set up the module and its optimizers.

    Parameters, gradients and optimizer states are exact, whatever the strategy: parameters are counted as they lie,
    DTensors by the rank's own shard; the ``ownership`` of an optimizer that spreads its state over ranks says what of a
    parameter is this rank's; a strategy whose ``stage`` is 2 keeps the gradients of these parts only. Where gradients
    are accumulated, and reduced at the end only, they are whole until then.

    Args:
        trainer: Source of strategy, optimizers and precision.
        pl_module: Its parameters are in place.
        tokens: Tokens of a micro-batch on this rank; by default as the datamodule and the model's config have it, 0
            if neither does.
    """
    if tokens is None:
        tokens = (row_length(trainer, pl_module) or 0) * rows_per_device(trainer)
    trained: list[Tensor] = [param for param in pl_module.parameters() if param.requires_grad]
    if _accumulates(trainer):
        gradients = sum(map(_unreduced_bytes, trained))
    elif getattr(trainer.strategy, "stage", 1) == 2:
        gradients = _bytes(part for param in trained if (part := _owned(param, trainer.optimizers)) is not None)
    else:
        gradients = _bytes(trained)
    return MemoryEstimate(
        parameters=_bytes(pl_module.parameters()),
        gradients=gradients,
        optimizer_states=sum(_state_bytes(optimizer) for optimizer in trainer.optimizers),
        activations=_activations(pl_module, tokens, str(trainer.precision)),
    )


def measured_memory(trainer: Trainer, pl_module: LightningModule, *, activations: int) -> MemoryEstimate:
    """Return what this rank holds now, tensor by tensor, shared memory once.

    Args:
        trainer: Has the optimizers.
        pl_module: Has parameters, and gradients if it is asked between the backward pass and `zero_grad`.
        activations: Bytes counted by `SavedActivations`.
    """
    optimizers = trainer.optimizers
    return MemoryEstimate(
        parameters=_bytes(pl_module.parameters()),
        gradients=_bytes(gradient for one in optimizers for gradient in held_gradients(one, trainer.strategy)),
        optimizer_states=_bytes(tensor for one in optimizers for tensor in tensors_in(one.state)),
        activations=activations,
    )


def bucket_bytes(trainer: Trainer) -> int:
    """Return what `DistributedDataParallel` holds beside the gradients: a second copy, unless these are views of it."""
    model = trainer.strategy.model
    if not isinstance(model, DistributedDataParallel) or model.gradient_as_bucket_view:
        return 0
    return _bytes(param for param in model.parameters() if param.requires_grad)


def capacity_bytes(trainer: Trainer) -> int | None:
    """Return how much a rank may use: all of its GPU, its share of a machine's memory, ``None`` where nobody says."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return (total if limit == "max" else min(total, int(limit))) // max(1, trainer.num_devices)


class SavedActivations:
    """Counts what the forward pass keeps for the backward pass, parameters left out and shared memory once.

    Args:
        module: Its parameters are kept anyway.
    """

    def __init__(self, module: nn.Module) -> None:
        self._known = {_place(local_tensor(tensor)) for tensor in (*module.parameters(), *module.buffers())}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self.counting = False
        self.num_bytes = 0
        """So far."""

    def start(self) -> None:
        """Count from here on."""
        self.counting = True
        self._hooks.__enter__()

    def stop(self) -> None:
        """Count no more; nothing happens if it does not count."""
        if self.counting:
            self._hooks.__exit__()
        self.counting = False

    def _count(self, tensor: Tensor) -> Tensor:
        local = local_tensor(tensor)
        if _place(local) not in self._known:
            self._known.add(_place(local))
            self.num_bytes += local.untyped_storage().nbytes()
        return tensor.detach()  # an output that held itself would never be freed


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, any other tensor as it is."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Tensor]) -> int:
    unique = {(local.data_ptr(), local.shape): local for local in map(local_tensor, tensors) if local.numel()}
    return sum(local.nbytes for local in unique.values())


def _owned(param: Tensor, optimizers: Iterable[Any]) -> Tensor | None:
    """Return what of a parameter this rank updates, where an optimizer is spread over ranks; else ``None``."""
    for optimizer in optimizers:
        if hasattr(optimizer, "ownership") and param in optimizer.ownership.placements:
            part: Tensor | None = optimizer.ownership.local(param)
            return part
    return None


def _accumulates(trainer: Trainer) -> bool:
    """Return whether gradients are added up before they are reduced over ranks."""
    return trainer.accumulate_grad_batches > 1 and not getattr(trainer.strategy, "reduce_every_micro_batch", False)


def _unreduced_bytes(param: Any) -> int:
    """Return the bytes of a gradient before its reduction: whole, but for the axes that split the matrix itself."""
    if not hasattr(param, "placements"):
        return int(param.nbytes)
    shape: list[int] = list(param.shape)
    for axis, (name, place) in enumerate(zip(param.device_mesh.mesh_dim_names, param.placements, strict=True)):
        if place.is_shard() and name != "data_parallel":
            ranks, rank = param.device_mesh.size(axis), param.device_mesh.get_local_rank(axis)
            part = math.ceil(shape[place.dim] / ranks)  # as DTensor cuts: equal parts, the last ones shorter or empty
            shape[place.dim] = max(0, min(part, shape[place.dim] - part * rank))
    return math.prod(shape) * int(param.element_size())


def _state_bytes(optimizer: Any) -> int:
    if hasattr(optimizer, "ownership"):
        return predicted_state_bytes(optimizer.inner, optimizer.ownership.local)
    return predicted_state_bytes(optimizer, local_tensor)


def _activations(pl_module: LightningModule, tokens: int, precision: str) -> int:
    """Estimate the most that is kept for the backward pass at once.

    With recomputed layers that is their inputs, and either one layer in full or, at the end of the forward pass, the
    copies of all trained weights in the cache of autocast.
    """
    element_bytes, autocast = 2 if "16" in precision else 4, precision.endswith("mixed")

    def of(part: nn.Module) -> int:
        return memory_estimate(part, tokens, activation_bytes=element_bytes, autocast=autocast).activations

    blocks = list(blocks_of(pl_module)) if getattr(pl_module, "activation_checkpointing", "none") == "blocks" else []
    if not blocks or not tokens:
        return of(pl_module)
    inputs = sum(_width(block) for block in blocks) * tokens * element_bytes
    linear = (part for block in blocks for part in block.modules() if isinstance(part, nn.Linear))
    cached = cast_bytes(part.weight for part in linear if part.weight.requires_grad) if autocast else 0
    return inputs + max([cached, *map(of, blocks)])


def _width(block: nn.Module) -> int:
    return next((module.in_features for module in block.modules() if isinstance(module, nn.Linear)), 0)

"""Memory of a rank during training, predicted from its parts and counted from its tensors; both in bytes."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lm.callbacks.batches import row_length, rows_per_device
from lightning_lm.models.summary import MemoryEstimate, memory_estimate
from lightning_lm.modules.activation_checkpointing import blocks_of
from lightning_lm.modules.gradient_normalization import held_gradients
from lightning_lm.optim.memory import predicted_state_bytes, tensors_in

__all__ = ["SavedActivations", "bucket_bytes", "capacity_bytes", "measured_memory", "predicted_memory"]

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def predicted_memory(trainer: Trainer, pl_module: LightningModule, *, tokens: int | None = None) -> MemoryEstimate:
    """Return what this rank will hold, once the strategy has set up the module and its optimizers.

    Parameters, gradients and optimizer states are exact, whatever the strategy: parameters are counted as they lie,
    DTensors by the rank's own shard; the ``ownership`` of an optimizer that spreads its state over ranks says what of a
    parameter is this rank's; a strategy whose ``stage`` is 2 keeps the gradients of these parts only.

    Args:
        trainer: Source of strategy, optimizers and precision.
        pl_module: Its parameters are in place.
        tokens: Tokens of a micro-batch on this rank; by default as the datamodule and the model's config have it, 0
            if neither does.
    """
    if tokens is None:
        tokens = (row_length(trainer, pl_module) or 0) * rows_per_device(trainer)
    gradients: list[Tensor] = [param for param in pl_module.parameters() if param.requires_grad]
    if getattr(trainer.strategy, "stage", 1) == 2:
        gradients = [part for param in gradients if (part := _owned(param, trainer.optimizers)) is not None]
    return MemoryEstimate(
        parameters=_bytes(pl_module.parameters()),
        gradients=_bytes(gradients),
        optimizer_states=sum(_state_bytes(optimizer) for optimizer in trainer.optimizers),
        activations=_activations(pl_module, tokens, 2 if "16" in str(trainer.precision) else 4),
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


def _state_bytes(optimizer: Any) -> int:
    if hasattr(optimizer, "ownership"):
        return predicted_state_bytes(optimizer.inner, optimizer.ownership.local)
    return predicted_state_bytes(optimizer, local_tensor)


def _activations(pl_module: LightningModule, tokens: int, element_bytes: int) -> int:
    """Estimate what the forward pass keeps; with recomputed layers their inputs, and one layer in full."""

    def of(part: nn.Module) -> int:
        return memory_estimate(part, tokens, activation_bytes=element_bytes).activations

    blocks = list(blocks_of(pl_module)) if getattr(pl_module, "activation_checkpointing", "none") == "blocks" else []
    if not blocks:
        return of(pl_module)
    inputs = sum(_width(block) for block in blocks) * tokens * element_bytes
    return inputs + max(of(block) for block in blocks)


def _width(block: nn.Module) -> int:
    return next((module.in_features for module in block.modules() if isinstance(module, nn.Linear)), 0)

"""Ranks of a run: which of them read different data, and collectives over them."""

import contextlib
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_lm.errors import CheckpointError, RunStopped

__all__ = ["Ranks", "data_rank", "data_ranks", "require_all_ranks", "runs_alone", "whole_model"]


def whole_model(trainer: Trainer) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which each rank can run its module's model by itself; strategies that shard it offer one."""
    context: Any = getattr(trainer.strategy, "generation_context", contextlib.nullcontext)
    return cast(contextlib.AbstractContextManager[Any], context(trainer.lightning_module))


def runs_alone(trainer: Trainer) -> bool:
    """Return whether a rank can run the model without the ranks that read other data: it has all parameters.

    A pass of sharded parameters gathers them, for which all ranks are needed.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return False
    return hasattr(strategy, "generation_context") or type(strategy) in (DDPStrategy, SingleDeviceStrategy)


def data_ranks(trainer: Trainer | Strategy) -> int:
    """Return the number of ranks that read different data; ranks that split a model among them read the same."""
    return int(_sampler_settings(trainer).get("num_replicas", getattr(trainer, "world_size", 1)))


def data_rank(trainer: Trainer | Strategy | None) -> int:
    """Return the index of this rank among those that read different data; 0 without a Trainer."""
    return int(_sampler_settings(trainer).get("rank", getattr(trainer, "global_rank", 0)))


def _sampler_settings(trainer: Trainer | Strategy | None) -> Mapping[str, int]:
    return getattr(getattr(trainer, "strategy", trainer), "distributed_sampler_kwargs", None) or {}


def require_all_ranks(trainer: Trainer) -> None:
    """Refuse a collective save on a rank that fails alone: the others would never join it.

    Call it before the first collective of a save. A callback that saves on exceptions
    (``ModelCheckpoint(save_on_exception=True)``, `OnExceptionCheckpoint`) runs on the rank that fails while the others
    are training; they would mistake its messages for others, or hang until the group's timeout.

    Raises:
        CheckpointError: If this process handles an exception that ended a run of several ranks.
    """
    error = sys.exc_info()[1]
    together = isinstance(error, RunStopped) and error.agreed
    if trainer.world_size > 1 and trainer.interrupted and error is not None and not together:
        raise CheckpointError(
            f"Rank {trainer.global_rank} of {trainer.world_size} fails with {type(error).__name__} after "
            f"{trainer.global_step} steps and saves nothing: the other ranks may not have failed, and a checkpoint "
            "needs all. Resume from the newest one; to have newer ones, save every n steps (LastCheckpoint) instead of "
            "on exceptions."
        ) from error


class Ranks:
    """Collectives over the ranks of a Trainer.

    Args:
        trainer: Trainer of the run.

    Attributes:
        rank: Index of this rank among those that read different data.
        world_size: Number of ranks, those that read the same data included.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._strategy = trainer.strategy
        self.world_size = trainer.world_size
        self.rank = data_rank(trainer)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums over all ranks. Collective: call on all ranks."""
        return torch.as_tensor(self._strategy.reduce(values, reduce_op="sum")) if self.world_size > 1 else values

    def largest(self, number: int) -> int:
        """Return the maximum over all ranks. Collective: call on all ranks."""
        if self.world_size == 1:
            return number
        mine = torch.tensor(float(number), device=self._strategy.root_device)
        return int(torch.as_tensor(self._strategy.reduce(mine, reduce_op="max")))

    def gather(self, values: Tensor) -> Tensor:
        """Return the rows of all ranks, which must have equally many, in the order of ranks. Collective."""
        if self.world_size == 1:
            return values
        gathered: Tensor = self._strategy.all_gather(values)
        return gathered.flatten(0, 1)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the object of each rank that reads different data, in their order. Collective: call on all ranks.

        Args:
            value: Anything that can be pickled; the same on ranks that read the same data.
        """
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, (self.rank, value))
        found = dict(sorted(gathered, key=lambda entry: entry[0]))
        return list(found.values())

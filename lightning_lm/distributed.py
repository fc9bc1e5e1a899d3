"""Processes of a run that read different data, and their communication while they sample."""

import contextlib
import sys
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_lm.errors import CheckpointError, RunStopped

__all__ = ["Ranks", "data_rank", "data_ranks", "require_all_ranks", "whole_model"]


def whole_model(trainer: Trainer) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which each rank can run its module's model by itself; strategies that shard it offer one."""
    context: Any = getattr(trainer.strategy, "generation_context", contextlib.nullcontext)
    return cast(contextlib.AbstractContextManager[Any], context(trainer.lightning_module))


def data_ranks(trainer: Trainer) -> int:
    """Return how many ranks read different data: fewer than there are where some share each matrix."""
    return int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size))


def data_rank(trainer: Trainer | None) -> int:
    """Return the number of this rank among those that read different data; without a Trainer 0."""
    if trainer is None:
        return 0
    return int((trainer.distributed_sampler_kwargs or {}).get("rank", trainer.global_rank))


def require_all_ranks(trainer: Trainer) -> None:
    """Refuse to save where the ranks would wait for one another in vain: one that fails cannot know of the others.

    Call it before the first exchange between ranks of a save. A callback that saves on exceptions
    (``ModelCheckpoint(save_on_exception=True)``, `OnExceptionCheckpoint`) runs on the rank that fails while the others
    are at work; they would take what it sends for something else, or hang until the group's timeout.

    Raises:
        CheckpointError: If this process handles an exception that ended a run of several ranks.
    """
    error = sys.exc_info()[1]
    together = isinstance(error, RunStopped) and error.agreed
    if trainer.world_size > 1 and trainer.interrupted and error is not None and not together:
        raise CheckpointError(
            f"Rank {trainer.global_rank} of {trainer.world_size} fails with {type(error).__name__} after "
            f"{trainer.global_step} steps and saves nothing: the other ranks may not have failed, and a checkpoint "
            "needs all. Go on from the newest one; to have newer ones, save every n steps (LastCheckpoint) instead of "
            "on exceptions."
        ) from error


class Ranks:
    """This process among those of a Trainer.

    Args:
        trainer: Trainer that knows the other ranks.

    Attributes:
        rank: Number of this one among those that read different prompts.
        world_size: Number of processes, also of those that share their prompts.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._strategy = trainer.strategy
        self.world_size = trainer.world_size
        self.rank = data_rank(trainer)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums over all ranks. Every rank must ask."""
        return torch.as_tensor(self._strategy.reduce(values, reduce_op="sum")) if self.world_size > 1 else values

    def largest(self, number: int) -> int:
        """Return the largest number that a rank gave. Every rank must ask."""
        if self.world_size == 1:
            return number
        mine = torch.tensor(float(number), device=self._strategy.root_device)
        return int(torch.as_tensor(self._strategy.reduce(mine, reduce_op="max")))

    def gather(self, values: Tensor) -> Tensor:
        """Return the rows of all ranks, which must have equally many, one rank after the other."""
        if self.world_size == 1:
            return values
        gathered: Tensor = self._strategy.all_gather(values)
        return gathered.flatten(0, 1)

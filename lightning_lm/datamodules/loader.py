"""Loaders whose batches follow from the position in the data alone.

Lightning puts no sampler into them (they are no ``DataLoader``) and fetches nothing ahead of the step (they have a
length), so the rows handed out are the rows trained on.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_lm.distributed import data_rank, data_ranks
from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Part
from lightning_lm.types import IGNORE_INDEX

__all__ = ["DataShard", "Loading", "RowStream", "TrainLoader", "ValidationLoader"]

Batch = dict[str, Tensor]


class RowStream(Protocol):
    """An endless order of rows, each a pure function of its index; `TokenStream` is one."""

    rows_per_epoch: int
    """Rows until all were seen once."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of `description`."""
        ...

    @property
    def description(self) -> dict[str, object]:
        """Everything that decides the rows, by name."""
        ...

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows with these indices. ``labels`` may have several lines for each, one set below the other."""
        ...


@runtime_checkable
class StepStream(Protocol):
    """A stream with rows that a whole optimizer step needs before its first micro-batch; `UnpairedStream` is one."""

    def step_batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return these rows for the places of one rank in a step. They come with its first micro-batch."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading(Part):
    """Settings of data preparation and loading; nothing here changes which rows are seen.

    Args:
        num_workers: Processes that build batches ahead of training; 0 builds them in the training process, which
            takes about 0.2 ms for 4,096 tokens.
        prefetch: Batches that each worker process keeps ready.
        pin_memory: Copy batches to page-locked memory, for faster transfer to a GPU.
        tokenize_workers: Processes that tokenize; by default one per core.
        cache_dir: Folder that keeps tokenizer and tokens for the next run. By default ``lightning-lm`` in
            ``$XDG_CACHE_HOME`` or ``~/.cache``.
        show_progress: Draw progress bars while preparing.
        accept_changed_data: Resume from the checkpoint's position although the rows are no longer the same.
    """

    num_workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    tokenize_workers: int | None = None
    cache_dir: str | None = None
    show_progress: bool = True
    accept_changed_data: bool = False

    def __post_init__(self) -> None:
        least = {"num_workers": 0, "prefetch": 1, "tokenize_workers": 1}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ConfigurationError(f"{name} must be at least {limit}, got {value}.")


@dataclasses.dataclass(frozen=True)
class DataShard:
    """The part of each optimizer step's rows that one rank reads, and in how many micro-batches.

    Args:
        batch_size: Rows of an optimizer step, over all ranks and micro-batches.
        num_ranks: Ranks that read different rows.
        rank: This rank.
        micro_batches: Batches whose gradients are accumulated.

    Raises:
        ConfigurationError: If the rows cannot be split equally.
    """

    batch_size: int
    num_ranks: int = 1
    rank: int = 0
    micro_batches: int = 1

    def __post_init__(self) -> None:
        parts = self.num_ranks * self.micro_batches
        if self.batch_size < 1 or self.batch_size % parts:
            raise ConfigurationError(
                f"batch_size={self.batch_size} rows per optimizer step cannot be split equally over {self.num_ranks} "
                f"rank(s) times accumulate_grad_batches={self.micro_batches}; use a multiple of {parts}."
            )

    @classmethod
    def of(cls, trainer: Trainer | None, batch_size: int, *, micro_batches: int | None = None) -> "DataShard":
        """Return the shard of this rank; ranks that split a model read the same rows.

        Args:
            trainer: Trainer of the run.
            batch_size: Rows of an optimizer step.
            micro_batches: Batches whose gradients are accumulated; by default those of the Trainer.

        Raises:
            ConfigurationError: If there are several ranks and the strategy does not assign rows to them.
        """
        if trainer is None:
            return cls(batch_size)
        if trainer.distributed_sampler_kwargs is None and trainer.world_size > 1:
            raise ConfigurationError(
                f"{type(trainer.strategy).__name__} runs {trainer.world_size} processes and does not say which of them "
                "read the same rows, so that all would train on all rows. Give it distributed_sampler_kwargs "
                '(num_replicas and rank), as Lightning\'s ParallelStrategy has them, or use "ddp".'
            )
        return cls(
            batch_size,
            num_ranks=data_ranks(trainer),
            rank=data_rank(trainer),
            micro_batches=micro_batches or trainer.accumulate_grad_batches,
        )

    @property
    def rows(self) -> int:
        """Rows of one micro-batch of one rank."""
        return self.batch_size // (self.num_ranks * self.micro_batches)


class TrainLoader:
    """Micro-batches of an endless stream from the position of training.

    Each optimizer step reads the next ``batch_size`` rows, whoever reads them: the same rows whatever the number of
    ranks, micro-batches and workers. An epoch is as many whole steps as show every row; the few rows that fill its
    last step are the first of the next permutation.

    Args:
        stream: The rows.
        shard: Part of the data that this rank reads.
        position: Returns the number of rows trained on so far; asked when the first batch is fetched.
        loading: Workers and their options.
    """

    def __init__(self, stream: RowStream, shard: DataShard, position: Callable[[], int], loading: Loading) -> None:
        self._stream, self._shard, self._position, self._loading = stream, shard, position, loading

    def __len__(self) -> int:
        """Return the number of micro-batches of an epoch."""
        return -(-self._stream.rows_per_epoch // self._shard.batch_size) * self._shard.micro_batches

    def __iter__(self) -> Iterator[Batch]:
        batches = _TrainBatches(self._stream, self._shard, self._position())
        yield from _fetched(batches, range(len(self)), self._loading)

    def state_dict(self) -> dict[str, int]:
        """Return the position, for Lightning to see that this loader can be resumed; the datamodule restores it."""
        return {"samples": self._position()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Do nothing: the datamodule has restored the position, and checks the data it belongs to."""


class ValidationLoader:
    """Every row of a stream once, in order, equally many batches on each rank.

    Rows are dealt to ranks in turn. Where they run out, rows in which nothing is measured fill the last batches.

    Args:
        stream: The rows; only its first epoch is read.
        shard: Part of the data that this rank reads.
        loading: Workers and their options.
    """

    def __init__(self, stream: RowStream, shard: DataShard, loading: Loading) -> None:
        self._stream, self._shard, self._loading = stream, shard, loading

    def __len__(self) -> int:
        """Return the number of batches of this rank, the same for every rank."""
        return -(-self._stream.rows_per_epoch // (self._shard.rows * self._shard.num_ranks))

    def __iter__(self) -> Iterator[Batch]:
        yield from _fetched(_ValidationBatches(self._stream, self._shard), range(len(self)), self._loading)


class _TrainBatches(Dataset[Batch]):
    def __init__(self, stream: RowStream, shard: DataShard, position: int) -> None:
        self._stream, self._shard, self._first, self._steps = stream, shard, position, isinstance(stream, StepStream)

    def __getitem__(self, number: int) -> Batch:
        shard = self._shard
        step, micro_batch = divmod(number, shard.micro_batches)
        first = self._first + step * shard.batch_size + (micro_batch * shard.num_ranks + shard.rank) * shard.rows
        rows = self._stream.batch(np.arange(first, first + shard.rows))
        return _tensors(rows if micro_batch or not self._steps else self._with_step(rows, first))

    def _with_step(self, rows: dict[str, np.ndarray], first: int) -> dict[str, np.ndarray]:
        """Return the first micro-batch of a step with the rows that the whole step needs."""
        assert isinstance(self._stream, StepStream)
        shard = self._shard
        starts = first + np.arange(shard.micro_batches)[:, None] * shard.num_ranks * shard.rows
        return rows | self._stream.step_batch((starts + np.arange(shard.rows)).ravel())


class _ValidationBatches(Dataset[Batch]):
    def __init__(self, stream: RowStream, shard: DataShard) -> None:
        self._stream, self._shard = stream, shard

    def __getitem__(self, number: int) -> Batch:
        shard = self._shard
        indices = (number * shard.rows + np.arange(shard.rows)) * shard.num_ranks + shard.rank
        outside = indices >= self._stream.rows_per_epoch
        inside = np.where(outside, 0, indices)
        rows = self._stream.batch(inside)
        if isinstance(self._stream, StepStream):
            rows |= self._stream.step_batch(inside)
            rows["mismatched_labels"][outside] = IGNORE_INDEX
        rows["labels"][np.tile(outside, len(rows["labels"]) // len(outside))] = IGNORE_INDEX
        return _tensors(rows)


def _tensors(rows: dict[str, np.ndarray]) -> Batch:
    return {name: torch.from_numpy(values) for name, values in rows.items()}


def _fetched(batches: Dataset[Batch], numbers: Sequence[int], loading: Loading) -> Iterator[Batch]:
    if not loading.num_workers and not loading.pin_memory:
        return (batches[number] for number in numbers)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=loading.num_workers,
        prefetch_factor=loading.prefetch if loading.num_workers else None,
        pin_memory=loading.pin_memory,
        generator=torch.Generator(),  # Its own: the global one belongs to dropout, and must not depend on workers.
    )
    return iter(loader)

"""Metrics as sums and counts: exact whatever the batches, micro-batches and ranks, and resumed with the run."""

import abc
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_lm._lightning import trainer_of
from lightning_lm.data.batches import batch_error
from lightning_lm.distributed import data_rank
from lightning_lm.functional.dtypes import accumulation_dtype
from lightning_lm.types import TokenBatch

__all__ = ["Kind", "MeasuredModule", "RunningMetrics"]

Kind = Literal["mean", "max", "min", "total"]
"""Reduction of the values of one name: their mean or extreme since the last time, or their sum since the start."""

Number = Tensor | float
Key = tuple[Kind, str]


class RunningMetrics:
    """Values by name, added up on the device in float64 where it has it, and over ranks only when they are read."""

    def __init__(self) -> None:
        self._values: dict[Key, Tensor] = {}

    def add(self, kind: Kind, name: str, value: Number, count: Number = 1, *, device: torch.device) -> None:
        """Take a value in, without waiting for the device.

        Args:
            kind: Reduction of the values.
            name: Name of the metric.
            value: A sum over ``count`` items where a mean is wanted.
            count: Number of items, 0 included.
            device: Device of the stored values.
        """
        dtype = accumulation_dtype(device)
        pair = torch.stack([torch.as_tensor(number).detach().to(device, dtype) for number in (value, count)])
        before = self._values.get((kind, name))
        # Out of place: what was made under inference mode may not be updated outside it.
        self._values[kind, name] = pair if before is None else _joined(kind, before, pair.to(before.device))

    def read(self, strategy: Strategy) -> dict[str, float]:
        """Return every metric over all ranks, and reset means, minima and maxima. Collective: call on all ranks.

        Names without a count are omitted.
        """
        whole = self._over_ranks(strategy)
        # What is kept counts once: on the first of the ranks that read different data.
        kept = {key: value for key, value in whole.items() if key[0] == "total"} if data_rank(strategy) == 0 else {}
        self._values = kept
        values = torch.stack(list(whole.values())).tolist() if whole else []
        pairs = zip(whole, values, strict=True)
        return {name: value / count if kind == "mean" else value for (kind, name), (value, count) in pairs if count}

    def state_dict(self, strategy: Strategy) -> list[list[Any]]:
        """Return all values over all ranks as plain data. Collective: call on all ranks."""
        return [[kind, name, *pair.tolist()] for (kind, name), pair in self._over_ranks(strategy).items()]

    def load_state_dict(self, state: list[list[Any]], *, device: torch.device) -> None:
        """Go on from there. Only one rank may: the values are those of all ranks."""
        self.clear()
        for kind, name, value, count in state:
            self.add(kind, name, value, count, device=device)

    def clear(self) -> None:
        """Forget everything."""
        self._values = {}

    def _over_ranks(self, strategy: Strategy) -> dict[Key, Tensor]:
        device, dtype = strategy.root_device, accumulation_dtype(strategy.root_device)
        keys = _union(list(self._values))
        whole: dict[Key, Tensor] = {}
        for kind in sorted({kind for kind, _ in keys}):
            names = [key for key in keys if key[0] == kind]
            mine = torch.stack([self._values.get(key, _neutral(kind)).to(device, dtype) for key in names])
            reduce_op = kind if kind in ("max", "min") else "sum"
            whole.update(zip(names, torch.as_tensor(strategy.reduce(mine, reduce_op=reduce_op)).unbind(), strict=True))
        return whole


def _joined(kind: Kind, before: Tensor, new: Tensor) -> Tensor:
    if kind == "max":
        return torch.maximum(before, new)
    return torch.minimum(before, new) if kind == "min" else before + new


def _neutral(kind: Kind) -> Tensor:
    """Return what a rank adds for a name that it has not met."""
    return torch.full((2,), {"max": -torch.inf, "min": torch.inf}.get(kind, 0.0))


def _union(keys: list[Key]) -> list[Key]:
    """Return the names of all ranks, in one order: a rank may have met fewer of them."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return sorted(keys)
    gathered: list[list[Key]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, keys)
    return sorted({key for theirs in gathered for key in theirs})


class _ShownScalar(Tensor):
    """A scalar that is read from its device when a progress bar prints it, and printed as a number."""

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.item():.4f}"

    def __format__(self, format_spec: str) -> str:
        return format(self.item(), format_spec or ".4f")


class MeasuredModule(LightningModule, abc.ABC):
    """A module that logs exact metrics: ``train/...`` at the log interval, ``val/...`` and ``test/...`` at the end."""

    batch_type: ClassVar[Any] = TokenBatch
    """Keys of a batch."""
    batch_source: ClassVar[str] = "ChatDataModule"
    """Data module that makes such batches."""

    def __init__(self) -> None:
        super().__init__()
        self.last_metrics: dict[str, float] = {}
        """The numbers that were logged last, by name."""
        self._trained, self._evaluated = RunningMetrics(), RunningMetrics()

    @abc.abstractmethod
    def evaluate_batch(self, batch: Any) -> dict[str, Tensor]:
        """Return ``nll_sum`` (float64, nats), ``num_tokens`` (int64) and ``target_ids`` of a batch, detached."""

    def record(self, name: str, total: Number, count: Number = 1) -> None:
        """Add to a mean.

        Args:
            name: Logged as ``train/name`` while training, ``val/name`` in a validation, ``test/name`` in a test.
            total: Sum over some items; a tensor is not waited for.
            count: Number of values. May be 0; a name without any is not logged.
        """
        self._running().add("mean", name, total, count, device=self.device)

    def record_max(self, name: str, value: Number) -> None:
        """Keep the largest value; otherwise as `record`."""
        self._running().add("max", name, value, device=self.device)

    def record_min(self, name: str, value: Number) -> None:
        """Keep the smallest value; otherwise as `record`."""
        self._running().add("min", name, value, device=self.device)

    def record_total(self, name: str, amount: Number) -> None:
        """Add to a total that grows from the start of training to its end, over all ranks; otherwise as `record`."""
        self._running().add("total", name, amount, device=self.device)

    def _running(self) -> RunningMetrics:
        trainer = trainer_of(self)
        evaluates = trainer is not None and (trainer.validating or trainer.sanity_checking or trainer.testing)
        return self._evaluated if evaluates else self._trained

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Add up a batch, and return its sums for callbacks."""
        return self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Add up a batch, and return its sums for callbacks."""
        return self._evaluate(batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the sums of a batch, and log nothing."""
        return self._checked_sums(batch)

    def _evaluate(self, batch: Any) -> dict[str, Tensor]:
        sums = self._checked_sums(batch)
        self.record("loss", sums["nll_sum"], sums["num_tokens"])
        return sums

    def _checked_sums(self, batch: Any) -> dict[str, Tensor]:
        try:
            return self.evaluate_batch(batch)
        except (KeyError, TypeError, AttributeError) as error:
            raise batch_error(error, batch, self) from None

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` (nats per target token over all batches and ranks) and whatever else was recorded."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss`` (nats per target token over all batches and ranks) and whatever else was recorded."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        metrics = {f"{stage}/{name}": value for name, value in self._evaluated.read(self.trainer.strategy).items()}
        self._evaluated.clear()
        if not self.trainer.sanity_checking:
            self.last_metrics.update(metrics)
            self.log_dict(metrics, sync_dist=True)

    def _show_loss(self, loss: Tensor) -> None:
        """Let Lightning's monitors and progress bars see the training loss, without waiting for the device.

        ``self.log(prog_bar=True)`` would read the value at every step, and average losses instead of tokens.

        Args:
            loss: Mean over the target tokens since the last log, a scalar on any device.
        """
        self.trainer.callback_metrics["train/loss"] = self.trainer.logged_metrics["train/loss"] = loss
        self.trainer.progress_bar_metrics["train/loss"] = loss.as_subclass(_ShownScalar)  # type: ignore[assignment]

    def _log_training(self, metrics: dict[str, float]) -> None:
        """Send the numbers of an interval, and what was recorded in it, to the loggers and callbacks."""
        recorded = self._trained.read(self.trainer.strategy)
        metrics = metrics | {f"train/{name}": value for name, value in recorded.items()}
        self.last_metrics.update(metrics)
        tensors = {name: torch.tensor(value) for name, value in metrics.items()}
        self.trainer.callback_metrics.update(tensors)
        self.trainer.logged_metrics.update(tensors)
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step + 1)

"""Base of datamodules over an endless order of rows: a position that is one integer, and resuming from it.

Lightning counts batches. Its count is of no use where a checkpoint was written between two micro-batches of a step
(the gradients of the first are lost), or where a step is now divided otherwise. The number of optimizer
steps is the position, and the batches are counted from it.
"""

import re
import warnings
from typing import Any, NamedTuple, Protocol

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_lm._lightning import warn_of_kept_values
from lightning_lm.datamodules.loader import DataShard, Loading, RowStream, TrainLoader
from lightning_lm.errors import ConfigurationError, FingerprintError

__all__ = ["ResumableDataModule", "StepAlignment", "Steps", "align_progress", "check_same_rows"]


class ResumableDataModule(LightningDataModule):
    """Rows in an endless order, read from the position of the optimizer.

    A checkpoint resumes exactly with other workers, micro-batches or ranks. A subclass sets ``_train`` in `setup`, and
    calls `attach` there.

    Args:
        batch_size: Rows per optimizer step, over all ranks and micro-batches.
        loading: Settings of workers; none changes which rows are seen.

    Attributes:
        batch_size: As given.

    Raises:
        ConfigurationError: If ``batch_size`` is below 1.
    """

    def __init__(self, *, batch_size: int, loading: Loading) -> None:
        super().__init__()
        warn_of_kept_values(type(self), "data")
        if batch_size < 1:
            raise ConfigurationError(f"batch_size must be at least 1, got {batch_size}.")
        self.batch_size = batch_size
        self._loading = loading
        self._train: RowStream | None = None
        self._samples = 0
        self._begin_step: int | None = None

    @property
    def prompt_is_prefix(self) -> bool:
        """True if rows begin with a prefix whose tokens see each other in both directions."""
        return False

    @property
    def samples_consumed(self) -> int:
        """Rows that the optimizer has been given since training began."""
        if self._begin_step is None or self.trainer is None:
            return self._samples
        return self._samples + (self.trainer.global_step - self._begin_step) * self.batch_size

    def attach(self, stage: str | None) -> None:
        """Follow the Trainer's steps.

        Args:
            stage: As `setup` got it.
        """
        if stage != "fit" or self.trainer is None:
            return
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        # The Trainer may have been given another datamodule before, whose steps are no concern any more.
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, StepAlignment)]
        callbacks.append(StepAlignment(self))
        if not self.trainer.global_step:
            self._samples, self._begin_step = 0, None

    def train_dataloader(self) -> TrainLoader:
        """Return the micro-batches of this rank, from wherever training stands."""
        assert self._train is not None, "setup() comes first"
        return TrainLoader(self._train, self._shard(), self._position, self._loading)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the fingerprint of the rows it counts."""
        if self._train is None:
            return {}
        return {
            "samples": self.samples_consumed,
            "fingerprint": self._train.fingerprint,
            "rows": self._train.description,
            "batch_size": self.batch_size,
            "micro_batches": self._shard().micro_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the position of a checkpoint.

        Raises:
            FingerprintError: If training resumes and its rows would not be the checkpoint's.
        """
        if self.trainer is None or self.trainer.state.fn == "fit":
            assert self._train is not None, "setup() comes first"
            check_same_rows(state_dict, self._train, accept=self._loading.accept_changed_data)
            self._samples, self._begin_step = int(state_dict["samples"]), None

    def begin_at(self, step: int) -> None:
        """Record that the position belongs to this optimizer step.

        Args:
            step: Number of optimizer steps that are done.
        """
        self._samples, self._begin_step = self.samples_consumed, step

    def _position(self) -> int:
        # overfit_batches asks for the same batches each epoch.
        overfits = self.trainer is not None and self.trainer.overfit_batches  # type: ignore[attr-defined]
        return 0 if overfits else self.samples_consumed

    def _shard(self) -> DataShard:
        return DataShard.of(self.trainer, self.batch_size)


class _CountsSteps(Protocol):
    batch_size: int

    def begin_at(self, step: int) -> None: ...


class _Described(Protocol):
    @property
    def fingerprint(self) -> str: ...

    @property
    def description(self) -> dict[str, object]: ...


class StepAlignment(Callback):
    """Keeps Lightning's count of batches in line with a position that is counted in optimizer steps.

    `TextDataModule` adds it to its Trainer by itself.

    Args:
        datamodule: Gets the optimizer step at which training begins.
    """

    def __init__(self, datamodule: _CountsSteps) -> None:
        self._datamodule = datamodule
        self._micro_batches = 1

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Count the batches of the checkpoint in the micro-batches of this run, before the loops read them."""
        state = checkpoint.get(type(self._datamodule).__qualname__)
        if state is not None:
            was, now = (
                Steps(state["batch_size"], state["micro_batches"]),
                Steps(self._datamodule.batch_size, trainer.accumulate_grad_batches),
            )
            align_progress(checkpoint["loops"]["fit_loop"], was=was, now=now)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Tell the datamodule the step that its position belongs to."""
        self._micro_batches = trainer.accumulate_grad_batches
        self._datamodule.begin_at(trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Refuse settings that would silently change the number of rows per optimizer step.

        Raises:
            ConfigurationError: If another callback has changed ``accumulate_grad_batches``.
        """
        if trainer.accumulate_grad_batches != self._micro_batches:
            raise ConfigurationError(
                f"accumulate_grad_batches changed from {self._micro_batches} to {trainer.accumulate_grad_batches} "
                "while training, but batch_size is the number of rows of a whole optimizer step. Remove the callback "
                "that changes it (GradientAccumulationScheduler)."
            )


def _brief(value: object) -> str:
    """Return a value as text, with shortened digests."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1...", str(value))


class Steps(NamedTuple):
    """Composition of an optimizer step."""

    batch_size: int
    """Rows of the step."""
    micro_batches: int
    """Batches that Lightning counts in it."""


def check_same_rows(state: dict[str, Any], stream: _Described, *, accept: bool) -> None:
    """Refuse to resume on other rows than those that a checkpoint's position counts.

    Args:
        state: The datamodule's state in the checkpoint.
        stream: The rows of this run.
        accept: Warn instead.

    Raises:
        FingerprintError: If they differ; the message has the difference and the remedy.
    """
    if state["fingerprint"] == stream.fingerprint:
        return
    now, was = stream.description, state["rows"]
    changed = [
        f"{name} was {_brief(was.get(name))}, is {_brief(now[name])}" for name in now if now[name] != was.get(name)
    ]
    message = f"The rows of this run are not those of the checkpoint: {'; '.join(changed)}."
    if not accept:
        raise FingerprintError(
            f"{message} Restore what changed, or train on the new rows from the checkpoint's position with "
            "loading=Loading(accept_changed_data=True)."
        )
    warnings.warn(f"{message} Going on at row {state['samples']} of the new rows, as asked.", stacklevel=2)


def align_progress(fit_loop: dict[str, Any], *, was: Steps, now: Steps) -> None:
    """Rewrite a checkpoint's count of batches in place so that it stands at the end of its last optimizer step.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``.
        was: The steps of the run that wrote the checkpoint.
        now: The steps of this run.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    steps = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    ready, stepped = batches["current"]["ready"], steps["current"]["completed"]
    # An epoch that Lightning cut short (limit_train_batches) ends with a step of fewer micro-batches.
    ends_short = batches["is_last_batch"] and -(-ready // was.micro_batches) == stepped
    at_end = ready == stepped * was.micro_batches or ends_short
    if at_end and was == now:
        return
    for name in ("current", "total"):
        counts = batches[name]
        open_hooks = counts["ready"] - counts["completed"] if at_end else 0
        count = steps[name]["completed"] * was.batch_size // now.batch_size * now.micro_batches
        counts.update(ready=count, started=count, processed=count, completed=count - open_hooks)

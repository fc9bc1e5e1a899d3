"""Base of datamodules over an endless order of rows: a position that is one integer, and resuming from it."""

from typing import Any

from lightning.pytorch import Callback, LightningDataModule

from lightning_lm.datamodules.loader import Loading, RowStream, Share, TrainLoader
from lightning_lm.datamodules.resume import StepAlignment, check_same_rows
from lightning_lm.errors import ConfigurationError

__all__ = ["PositionedDataModule"]


class PositionedDataModule(LightningDataModule):
    """Rows in an endless order, read from wherever the optimizer stands.

    A checkpoint resumes exactly with other workers, micro-batches or ranks. A subclass sets ``_train`` in `setup`, and
    calls `attach` there.

    Args:
        batch_size: Rows per optimizer step, over all ranks and micro-batches.
        loading: Workers, and what else changes no row.

    Attributes:
        batch_size: As given.

    Raises:
        ConfigurationError: If ``batch_size`` is below 1.
    """

    def __init__(self, *, batch_size: int, loading: Loading) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigurationError(f"batch_size must be at least 1, got {batch_size}.")
        self.batch_size = batch_size
        self._loading = loading
        self._train: RowStream | None = None
        self._samples = 0
        self._begin_step: int | None = None

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
        return TrainLoader(self._train, self._share(), self._position, self._loading)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what says which rows it counts."""
        if self._train is None:
            return {}
        return {
            "samples": self.samples_consumed,
            "fingerprint": self._train.fingerprint,
            "rows": self._train.description,
            "batch_size": self.batch_size,
            "micro_batches": self._share().micro_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the position of a checkpoint.

        Raises:
            FingerprintError: If training goes on and its rows would not be the checkpoint's.
        """
        if self.trainer is None or self.trainer.state.fn == "fit":
            assert self._train is not None, "setup() comes first"
            check_same_rows(state_dict, self._train, accept=self._loading.accept_changed_data)
            self._samples, self._begin_step = int(state_dict["samples"]), None

    def begin_at(self, step: int) -> None:
        """Take note that the position so far holds at this optimizer step.

        Args:
            step: Number of optimizer steps that are done.
        """
        self._samples, self._begin_step = self.samples_consumed, step

    def _position(self) -> int:
        # overfit_batches asks for the same batches each epoch.
        overfits = self.trainer is not None and self.trainer.overfit_batches  # type: ignore[attr-defined]
        return 0 if overfits else self.samples_consumed

    def _share(self) -> Share:
        return Share.of(self.trainer, self.batch_size)

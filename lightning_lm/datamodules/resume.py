"""Going on at the optimizer step a checkpoint belongs to, whatever its micro-batches were and now are.

Lightning counts batches. Its count is of no use where a checkpoint was written between two micro-batches of a step
(the gradients of the first are lost), or where a step is now divided otherwise. What counts is the number of optimizer
steps, so the batches are counted anew from it.
"""

import re
import warnings
from typing import Any, NamedTuple, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_lm.errors import ConfigurationError, FingerprintError

__all__ = ["StepAlignment", "Steps", "align_progress", "check_same_rows"]


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
        datamodule: Is told the optimizer step at which training begins.
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
        """Tell the datamodule the step at which its position holds."""
        self._micro_batches = trainer.accumulate_grad_batches
        self._datamodule.begin_at(trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Refuse what would change the number of rows per optimizer step unseen.

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
    """Return a value as text, its digests cut to what tells them apart."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1...", str(value))


class Steps(NamedTuple):
    """Composition of an optimizer step."""

    batch_size: int
    """Rows of the step."""
    micro_batches: int
    """Batches that Lightning counts in it."""


def check_same_rows(state: dict[str, Any], stream: _Described, *, accept: bool) -> None:
    """Refuse to go on in rows that are not those a checkpoint's position counts.

    Args:
        state: The datamodule's state in the checkpoint.
        stream: The rows of this run.
        accept: Warn instead.

    Raises:
        FingerprintError: Says what differs, and what to do.
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

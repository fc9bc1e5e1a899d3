"""The end of a run at a signal: ranks agree on it, the newest state is saved, and the command that resumes is shown."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed

from lightning_lm._lightning import (
    is_launched_child,
    log_step,
    no_signal_handlers,
    requeues,
    return_to_step_end,
    save_last,
)
from lightning_lm.errors import RunStopped
from lightning_lm.modules.signals import SIGNALS, stop_signals, stop_together

__all__ = ["SignalStop"]

_SLOW_S = 1.0


class SignalStop(Callback):
    """Ends a run at SIGTERM, SIGINT or SIGUSR1 without losing a step.

    The optimizer step, the validation batch or the rollout that is under way ends; all ranks stop there; the newest
    state is saved as ``last.ckpt``, by `LastCheckpoint` or into the folder of another ``ModelCheckpoint``; and
    `RunStopped` ends the process with status 128 + the signal's number. A second signal ends it at once. Before the
    first step a run just ends. On SLURM, Lightning's own handlers save and requeue, and only SIGINT is handled here.

    `LastCheckpoint`, the strategies of this package and the command line add one to the Trainer.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._agreement: _Agreement | None = None
        self._agreed = 0
        self._seen_step = 0
        self._validates_alike = False

    def __reduce__(self) -> tuple[type["SignalStop"], tuple[()]]:
        """Copies, with their Trainer, have taken over no signals."""
        return type(self), ()

    @staticmethod
    def attach(trainer: Trainer) -> None:
        """Add one to a Trainer that has none, before or while its callbacks are set up.

        Args:
            trainer: The Trainer of the run.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, SignalStop) for callback in callbacks):
            callbacks.append(SignalStop())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the signals over from Lightning; they end the set-up at once."""
        slurm = requeues(trainer)
        if not slurm:
            self._stack.enter_context(no_signal_handlers(trainer))
        stop_signals.install(
            kill=getattr(trainer.strategy.launcher, "kill", None),
            announce=_announce if trainer.is_global_zero and stage == "fit" else None,
            leave_alone=frozenset(SIGNALS) - {signal.SIGINT} if slurm else frozenset(),
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let signals wait for the end of a step."""
        self._agreement, self._agreed, self._seen_step = _Agreement(trainer), 0, trainer.global_step
        stop_signals.defer()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at the end of a step, once all ranks know of the signal."""
        if trainer.global_step == self._seen_step or not stop_signals.installed:
            return
        self._seen_step = trainer.global_step
        self._agreed = self._agreed or self._ask()
        if self._agreed and _resumes_exactly(trainer):
            log_step(trainer)
            stop_together(self._agreed)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out whether all ranks have equally many batches, so that they can stop between two."""
        if self._agreement is not None:
            count = sum(trainer.num_val_batches)
            limits = torch.tensor([count, -count], dtype=torch.float64)
            self._validates_alike = float(self._agreement.largest(limits).sum()) == 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop within a validation."""
        if self._agreement is not None and self._validates_alike and stop_signals.installed:
            stop_together(self._ask())

    def _ask(self) -> int:
        assert self._agreement is not None
        return self._agreement.ask(stop_signals.received)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, if all ranks stop together, and say where."""
        if isinstance(exception, RunStopped):
            saved, reason = None, "before the first step, so there is nothing to save"
            if self._agreement is not None and trainer.global_step:
                saved, reason = self._save(trainer, exception)
            if trainer.is_global_zero:
                sys.stderr.write(_report(trainer, exception, saved, reason))
            if is_launched_child(trainer):
                exception.code = 0  # the process that launched this one reports the signal
        self._end()

    def _save(self, trainer: Trainer, stop: RunStopped) -> tuple[str | None, str]:
        if trainer.world_size > 1 and not stop.agreed:
            return None, "while ranks could not save together"
        assert self._agreement is not None
        self._agreement.take()
        return_to_step_end(trainer)
        savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        savers.sort(key=lambda saver: not saver.save_last)
        if not savers or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None, "and no callback saves checkpoints: add LastCheckpoint"
        saver = savers[0]
        if saver.save_last:
            save_last(trainer, saver)
            path = saver.last_model_path
        else:
            path = str(Path(saver.dirpath or trainer.default_root_dir) / "last.ckpt")
            trainer.save_checkpoint(path, weights_only=False)
        trainer.strategy.checkpoint_io.teardown()  # waits for what is written in the background
        return path, ""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Receive the last message of the other ranks."""
        if self._agreement is not None:
            self._agreement.take()
        self._agreement = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._end()

    def _end(self) -> None:
        self._agreement = None
        stop_signals.restore()
        self._stack.close()


class _Agreement:
    """The signal that any rank has received, known on all ranks at the same step.

    Each step begins a collective and reads that of the step before, which has long arrived: no rank waits for another.
    After a step that takes a second or more its own result is read.

    Args:
        trainer: The Trainer of the run, whose ranks all ask equally often.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._several = trainer.world_size > 1 and distributed.is_available() and distributed.is_initialized()
        self._device = trainer.strategy.root_device
        self._pending: tuple[Callable[[], Any], Tensor] | None = None
        self._waits, self._asked_s = True, time.monotonic()

    def ask(self, signum: int) -> int:
        """Return a signal that a rank has received, or 0. Collective: call on all ranks.

        Args:
            signum: The signal that this rank has received, or 0.
        """
        if not self._several:
            return signum
        found = self.take()
        if not found:
            now = time.monotonic()
            slow, self._asked_s = now - self._asked_s > _SLOW_S, now
            self._pending = self._send(torch.tensor([signum, slow], dtype=torch.float32))
            found = self.take() if self._waits else 0
        return found

    def take(self) -> int:
        """Return what the collective that is under way has found."""
        if self._pending is None:
            return 0
        wait, received = self._pending
        self._pending = None
        wait()
        signum, slow = received.tolist()
        self._waits = bool(slow)
        return int(signum)

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest value of each place over all ranks, at once. Collective: call on all ranks.

        Args:
            values: A vector on the CPU.
        """
        if not self._several:
            return values
        wait, received = self._send(values)
        wait()
        return received.cpu()

    def _send(self, values: Tensor) -> tuple[Callable[[], Any], Tensor]:
        if self._device.type != "cuda":
            sent = values.to(self._device)
            work = distributed.all_reduce(sent, distributed.ReduceOp.MAX, async_op=True)
            return work.wait, sent
        # Pinned copies and an event: reading must not wait for the steps that are queued on the device since.
        sent = values.pin_memory().to(self._device, non_blocking=True)
        distributed.all_reduce(sent, distributed.ReduceOp.MAX, async_op=True).wait()
        received = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(sent, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return event.synchronize, received


def _resumes_exactly(trainer: Trainer) -> bool:
    """Return whether no rollout is under way, the rest of which a run that resumes would drop."""
    batches = getattr(trainer.train_dataloader, "batches_per_rollout", 1)
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return bool(progress.current.processed % batches == 0)


def _announce(name: str) -> None:
    text = f"\n{name}: the run saves and stops at the end of this step. A second signal ends it at once.\n"
    os.write(2, text.encode())


def _report(trainer: Trainer, stop: RunStopped, saved: str | None, reason: str) -> str:
    text = f"\nThe run was {stop} after step {trainer.global_step:,}"
    if saved is None:
        return f"{text}, {reason}.\n"
    return f"{text}. Saved {_near(saved)}. Resume with:\n  {_resume_command(trainer, _near(saved))}\n"


def _resume_command(trainer: Trainer, path: str) -> str:
    """Return what resumes a run: a command if the command line has started it, else a call."""
    folder = getattr(trainer.logger, "log_dir", None) or getattr(trainer.logger, "save_dir", None)
    config = Path(folder or trainer.default_root_dir) / "config.yaml"
    if config.is_file():
        return shlex.join(["lightning-lm", "fit", "--config", _near(str(config)), "--ckpt_path", path])
    data = "datamodule=datamodule" if trainer.datamodule is not None else "train_dataloader"  # type: ignore[attr-defined]
    return f"trainer.fit(module, {data}, ckpt_path={path!r})"


def _near(path: str) -> str:
    """Return a path relative to the current folder if it lies below it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative

"""One line that says where a training run stands, drawn twice a second in a terminal and seldom in a log file."""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TextIO

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich.live import Live
from rich.text import Text

from lightning_lm.callbacks.batches import num_predictions
from lightning_lm.callbacks.formatting import clock, short
from lightning_lm.callbacks.hooks import LeanHooks
from lightning_lm.callbacks.progress_line import Clock, fitted, progress, values_of
from lightning_lm.callbacks.training_loss import loss_of_step
from lightning_lm.distributed import data_ranks
from lightning_lm.modules import LMModule
from lightning_lm.parts import Limit, check_numbers

__all__ = ["LMProgressBar"]

_BAR_CELLS, _WIDE = 20, 100
_WINDOW_REFRESHES = 20
_FORECAST_AFTER_STEPS = 2  # the first step compiles and allocates: a forecast from it alone is far off


class _Mark(NamedTuple):
    """A moment of the run; the rate is what happened between two of them."""

    time_s: float
    tokens: int
    steps: int


class LMProgressBar(LeanHooks, ProgressBar):
    """Show step, loss, reward, validation, tokens per second, elapsed time and time left in one line.

    It replaces Lightning's own bar, which takes longer than the step of a small model: here a step costs two
    comparisons, and everything else happens at most ``1 / refresh_s`` times a second. The loss of an
    `LMModule` is the mean since its last log, that of another module the loss of its last batch. Other values come from
    ``trainer.callback_metrics`` (``train/reward``; of validation ``loss``, ``bits_per_byte``, ``pass@1`` and the
    accuracy of pairs), and whatever the module logs with ``prog_bar=True``. In a narrow terminal the bar shrinks and
    the last values go, so that speed and time left stay.

    Where the output is not a terminal (a log file, CI), a plain line is printed every ``plain_every_s`` seconds and
    after each validation.

    Args:
        refresh_s: Shortest time between two redraws, seconds.
        plain_every_s: Time between two lines without a terminal, seconds.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import LMProgressBar
        >>> trainer = Trainer(callbacks=[LMProgressBar()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, refresh_s: float = 0.5, plain_every_s: float = 30.0) -> None:
        super().__init__()
        limits = {"refresh_s": Limit.NON_NEGATIVE, "plain_every_s": Limit.NON_NEGATIVE}
        check_numbers(limits, {"refresh_s": refresh_s, "plain_every_s": plain_every_s})
        self._refresh_s = refresh_s
        self._plain_every_s = plain_every_s
        self._enabled = True
        self._live: Live | None = None
        self._next_s = 0.0
        self._tokens = 0
        self._outputs: Any = None
        self._shown_step: int | None = None
        self._start = _Mark(0.0, 0, 0)
        self._marks: deque[_Mark] = deque(maxlen=_WINDOW_REFRESHES)
        self._validation_start_s: float | None = None
        self._total_steps: int | None = None
        self._replicas = 1

    def enable(self) -> None:
        """Show the line again."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning calls this on ranks other than 0."""
        self._enabled = False
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the line."""
        rich.get_console().print(*args, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run starts, which after a resume is not 0."""
        total = trainer.estimated_stepping_batches
        self._total_steps = int(total) if math.isfinite(total) else None
        self._replicas = data_ranks(trainer)
        self._tokens = 0
        self._start = _Mark(time.monotonic(), 0, trainer.global_step)
        self._marks.clear()
        self._marks.append(self._start)
        if trainer.global_step and self._enabled:
            whole = "" if self._total_steps is None else f" of {self._total_steps:,}"
            source = "" if trainer.ckpt_path is None else f", from {trainer.ckpt_path}"
            self.print(f"Resuming after step {trainer.global_step:,}{whole}{source}", highlight=False, soft_wrap=True)
        self._wait()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; draw if it is time."""
        self._tokens += num_predictions(batch)
        self._outputs = outputs
        if self._enabled and time.monotonic() >= self._next_s:
            self._show(self._training_line(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the final state standing."""
        if self._enabled and self._shown_step != trainer.global_step:
            self._show(self._training_line(trainer))
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the rate."""
        self._validation_start_s = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the rate leave out the validation; in a log file, say what it gave."""
        if self._validation_start_s is not None:
            self._leave_out(time.monotonic() - self._validation_start_s)
        self._validation_start_s = None
        if self._enabled and trainer.state.fn == "fit" and not trainer.sanity_checking and not _in_terminal():
            self._show(self._training_line(trainer))

    @contextmanager
    def clock_stopped(self, trainer: Trainer) -> Iterator[None]:
        """Let the rate leave out what another callback does between two steps, such as sampling a text."""
        begin_s = time.monotonic()
        try:
            yield
        finally:
            if self._validation_start_s is None:  # else it is part of a validation's pause
                self._leave_out(time.monotonic() - begin_s)

    def _leave_out(self, pause_s: float) -> None:
        self._marks = deque((mark._replace(time_s=mark.time_s + pause_s) for mark in self._marks), _WINDOW_REFRESHES)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw if it is time."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._evaluated(trainer, "validation", batch_idx, batches[dataloader_idx])

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw if it is time."""
        self._evaluated(trainer, "test", batch_idx, trainer.num_test_batches[dataloader_idx])

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw if it is time."""
        self._evaluated(trainer, "prediction", batch_idx, trainer.num_predict_batches[dataloader_idx])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._close()

    def _evaluated(self, trainer: Trainer, what: str, batch_idx: int, num_batches: float) -> None:
        last = trainer.state.fn != "fit" and batch_idx + 1 == num_batches  # stays on the screen
        if self._enabled and _in_terminal() and (last or time.monotonic() >= self._next_s):
            total = f"/{num_batches:,}" if math.isfinite(num_batches) else ""
            fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
            cells = _BAR_CELLS if rich.get_console().width >= _WIDE else 0
            line = progress(trainer.global_step, self._total_steps, cells=cells) if fitting else Text()
            self._show(line.append(f"  {what} batch {batch_idx + 1:,}{total}", "green"))

    def _training_line(self, trainer: Trainer) -> Text:
        step, now = trainer.global_step, time.monotonic()
        self._shown_step = None if _in_terminal() else step
        self._marks.append(_Mark(now, self._tokens, step))
        left_s = self._seconds_left(trainer, step, now)
        end = Clock(self._rate(), clock(now - self._start.time_s), None if left_s is None else clock(left_s))
        values = values_of(self._loss(trainer), trainer.callback_metrics, trainer.progress_bar_metrics)
        width = rich.get_console().width if _in_terminal() else None
        return fitted(step, self._total_steps, values, end, width=width)

    def _loss(self, trainer: Trainer) -> Any:
        if isinstance(trainer.lightning_module, LMModule):  # whose steps return scaled sums
            return trainer.callback_metrics.get("train/loss")
        loss = loss_of_step(trainer, trainer.lightning_module, self._outputs)
        return trainer.callback_metrics.get("train/loss") if loss is None else loss

    def _rate(self) -> str:
        first, last = self._marks[0], self._marks[-1]
        if last.time_s <= first.time_s:
            return ""
        tokens_per_s = self._replicas * (last.tokens - first.tokens) / (last.time_s - first.time_s)
        if tokens_per_s:
            return f"  {short(tokens_per_s)} tok/s"
        return f"  {(last.steps - first.steps) / (last.time_s - first.time_s):.2f} steps/s"

    def _seconds_left(self, trainer: Trainer, step: int, now: float) -> float | None:
        timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
        forecasts = [timer.time_remaining() for timer in timers]
        if step == self._total_steps:
            return None
        done = step - self._start.steps
        if self._total_steps is not None and done >= _FORECAST_AFTER_STEPS:
            forecasts.append((now - self._start.time_s) / done * (self._total_steps - step))
        return min((left_s for left_s in forecasts if left_s is not None), default=None)

    def _show(self, line: Text) -> None:
        console = rich.get_console()
        if not _in_terminal():
            console.print(line.plain, highlight=False, soft_wrap=True)
        else:
            if self._live is None:
                self._live = Live(console=console, auto_refresh=False)
                stream = sys.stderr
                self._live.start()
                _redirect_logs(stream, sys.stderr)
            self._live.update(line, refresh=True)
        self._wait()

    def _wait(self) -> None:
        self._next_s = time.monotonic() + (self._refresh_s if _in_terminal() else self._plain_every_s)

    def _close(self) -> None:
        if self._live is not None:
            stream = sys.stderr
            self._live.stop()
            _redirect_logs(stream, sys.stderr)
            self._live = None


def _redirect_logs(old: TextIO, new: TextIO) -> None:
    """Let Lightning's log messages follow ``sys.stderr``, which prints above the line while that is drawn."""
    for handler in logging.getLogger("lightning.pytorch").handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is old:
            handler.setStream(new)


def _in_terminal() -> bool:
    return rich.get_console().is_terminal

"""What the line says, when it is drawn, and that it goes away."""

import io
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import rich
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.console import Console

from lightning_lm.callbacks import LMProgressBar, Perplexity
from lightning_lm.callbacks.formatting import clock, short
from lightning_lm.callbacks.hooks import clocks_stopped
from lightning_lm.callbacks.progress_line import Clock, Value, fitted


@pytest.fixture
def clock_of(monkeypatch):
    state = SimpleNamespace(now=50.0)
    monkeypatch.setattr("lightning_lm.callbacks.progress_bar.time", SimpleNamespace(monotonic=lambda: state.now))
    return state


@pytest.fixture
def slow_module(foreign_module, clock_of):
    class Slow(foreign_module):
        """A step takes two seconds, a validation batch a minute."""

        def training_step(self, batch, batch_idx):
            clock_of.now += 2
            return super().training_step(batch, batch_idx) * 0 + 1.5

        def validation_step(self, batch, batch_idx):
            clock_of.now += 60

    return Slow


@pytest.fixture
def console(monkeypatch):
    """Return a function that puts a terminal, or a file, in the place of the console."""

    def put(terminal):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=140, color_system=None)
        monkeypatch.setattr(rich, "get_console", lambda: console)
        return console

    return put


def fit(trainer_with, module, loader_of, batches_of, *callbacks, steps=20, **options):
    trainer = trainer_with(*callbacks, enable_progress_bar=True, max_epochs=1, **options)
    loader = loader_of(batches_of([(4, 11)] * steps, ignored=0.0))
    trainer.fit(module, loader, loader_of(batches_of([(4, 11)])))
    return trainer


def test_log_file_gets_a_plain_line_now_and_then(slow_module, loader_of, batches_of, trainer_with, console):
    """Every 10 s, so after steps 5, 10, ..., and after the validation behind step 12; no control codes."""
    file = console(terminal=False).file
    bar = LMProgressBar(plain_every_s=10.0)
    fit(trainer_with, slow_module(), loader_of, batches_of, bar, Perplexity(), val_check_interval=12)
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["5/20", "10/20", "12/20", "17/20", "20/20"]
    # 4 rows of 10 predictions in 2 s; 15 steps of 2 s are left after 10 s.
    assert lines[0] == "step 5/20  25%  loss 1.5000  20 tok/s  0:10 elapsed, 0:30 left"
    # The validation is in the elapsed time and in the forecast, not in the rate.
    assert "  val 5." in lines[3]
    assert lines[3].endswith("20 tok/s  1:34 elapsed, 0:16 left")
    assert lines[4].endswith("1:40 elapsed")
    assert "\x1b" not in file.getvalue()


def test_what_answers_earn_is_shown(slow_module, loader_of, batches_of, trainer_with, console):
    class Judged(slow_module):
        def training_step(self, batch, batch_idx):
            self.log("train/reward", 0.25)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("val/pass@1", 0.75)

    file = console(terminal=False).file
    fit(trainer_with, Judged(), loader_of, batches_of, LMProgressBar(), steps=2, log_every_n_steps=1)
    assert "  reward 0.2500  pass@1 0.7500  " in file.getvalue().splitlines()[-1]


def test_samples_are_not_in_the_rate(slow_module, loader_of, batches_of, trainer_with, console, clock_of):
    class Busy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with clocks_stopped(trainer):
                clock_of.now += 600

        def on_validation_end(self, trainer, pl_module):
            self.on_train_batch_end(trainer, pl_module, None, None, 0)

    file = console(terminal=False).file
    for callbacks in ([Busy(), LMProgressBar()], [LMProgressBar(), Busy()]):
        fit(trainer_with, slow_module(), loader_of, batches_of, *callbacks, val_check_interval=12)
    rates = [line.split(" tok/s")[0].split()[-1] for line in file.getvalue().splitlines() if "tok/s" in line]
    assert len(rates) > 20
    assert set(rates) == {"20"}


def test_terminal_gets_one_line_at_most_every_refresh(slow_module, loader_of, batches_of, trainer_with, console):
    file = console(terminal=True).file
    stdout = sys.stdout
    fit(trainer_with, slow_module(), loader_of, batches_of, LMProgressBar(refresh_s=6.0), limit_val_batches=0)
    drawn = [line for line in file.getvalue().replace("\n", "\r").split("\r") if "/20" in line]
    steps = list(dict.fromkeys(line.split("/20")[0].split()[-1] for line in drawn))
    assert steps == ["3", "6", "9", "12", "15", "18", "20"]
    assert "━" in drawn[0]
    assert file.getvalue().endswith("\x1b[?25h")  # the cursor is back
    assert sys.stdout is stdout


def test_validation_is_shown_beside_the_step(slow_module, loader_of, batches_of, trainer_with, console):
    file = console(terminal=True).file
    fit(trainer_with, slow_module(), loader_of, batches_of, LMProgressBar(), val_check_interval=10)
    assert "10/20  50%  validation batch 1/1" in file.getvalue()


def test_the_terminal_is_given_back_after_an_exception(slow_module, loader_of, batches_of, trainer_with, console):
    class Fails(slow_module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    file, stdout = console(terminal=True).file, sys.stdout
    with pytest.raises(RuntimeError, match="stop"):
        fit(trainer_with, Fails(), loader_of, batches_of, LMProgressBar(refresh_s=0.0))
    assert file.getvalue().endswith("\x1b[?25h")
    assert sys.stdout is stdout


def test_without_an_end_there_is_no_forecast(slow_module, loader_of, batches_of, trainer_with, console):
    file = console(terminal=False).file
    loader = loader_of(batches_of([(4, 11)] * 10, ignored=0.0))
    trainer = trainer_with(
        LMProgressBar(plain_every_s=10.0), enable_progress_bar=True, max_epochs=-1, max_time={"days": 1}
    )
    trainer.should_stop = False

    class Stops(slow_module):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.should_stop = batch_idx == 8

    trainer.fit(Stops(), loader)
    first = file.getvalue().splitlines()[0]
    assert first.startswith("step 5  loss 1.5000  20 tok/s  0:10 elapsed, 2")  # a day is left, says the timer
    assert first.endswith(" left")


def test_it_takes_the_place_of_lightnings_bar(trainer_with):
    bar = LMProgressBar()
    trainer = trainer_with(bar, enable_progress_bar=True)
    assert trainer.progress_bar_callback is bar
    assert not any(isinstance(callback, TQDMProgressBar) for callback in trainer.callbacks)


def test_disabled_it_is_silent(slow_module, loader_of, batches_of, trainer_with, console):
    file = console(terminal=True).file
    bar = LMProgressBar(refresh_s=0.0)
    bar.disable()
    fit(trainer_with, slow_module(), loader_of, batches_of, bar)
    assert file.getvalue() == ""


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_other_verbs(verb, foreign_module, loader_of, batches_of, trainer_with, console):
    class Module(foreign_module):
        def predict_step(self, batch, batch_idx):
            return None

    file = console(terminal=True).file
    trainer = trainer_with(LMProgressBar(refresh_s=0.0), enable_progress_bar=True)
    options = {} if verb == "predict" else {"verbose": False}
    getattr(trainer, verb)(Module(), loader_of(batches_of([(2, 5)] * 3)), **options)
    assert "batch 3/3" in file.getvalue()


def test_readable_numbers():
    assert [short(n) for n in (0, 9.876, 999, 999.6, 12_345, 5_600_000, 2.5e12)] == [
        "0", "9.88", "999", "1k", "12.3k", "5.6M", "2.5T",
    ]  # fmt: skip
    assert [clock(s) for s in (0, 59.9, 60, 3723)] == ["0:00", "0:59", "1:00", "1:02:03"]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("values", [0, 1, 5])
def test_speed_and_time_left_survive_in_a_narrow_terminal(width, values):
    shown = [Value("loss", 5.123456, ""), *(Value(f"metric_{i}", i, "") for i in range(values))]
    end = Clock("  12.3k tok/s", "1:02:03", "2:03:04")
    line = fitted(150_000, 2_000_000, shown, end, width=width).plain
    assert len(line) <= width
    for part in ("150,000/2,000,000", "8%", "loss 5.1235", "12.3k tok/s", "2:03:04 left"):
        assert part in line
    assert ("metric_0" in line) == (values > 0)
    assert ("elapsed" in line) == (width == 120 and values < 5)


def test_what_a_user_logs_for_the_bar_is_shown(slow_module, loader_of, batches_of, trainer_with, console):
    class Logs(slow_module):
        def training_step(self, batch, batch_idx):
            self.log("temperature", 0.5, prog_bar=True)
            self.log("hidden", 0.7)
            return super().training_step(batch, batch_idx)

    file = console(terminal=False).file
    fit(trainer_with, Logs(), loader_of, batches_of, LMProgressBar(plain_every_s=10.0))
    assert all("temperature 0.5000" in line for line in file.getvalue().splitlines())
    assert "hidden" not in file.getvalue()


def test_a_resumed_run_says_where(slow_module, loader_of, batches_of, trainer_with, console, tmp_path):
    first = fit(trainer_with, slow_module(), loader_of, batches_of, LMProgressBar(), steps=4)
    path = tmp_path / "a.ckpt"
    first.save_checkpoint(path)
    file = console(terminal=False).file
    trainer = trainer_with(LMProgressBar(), enable_progress_bar=True, max_epochs=2)
    trainer.fit(slow_module(), loader_of(batches_of([(4, 11)] * 4)), ckpt_path=path, weights_only=False)
    assert file.getvalue().splitlines()[0] == f"Resuming after step 4 of 8, from {path}"


def test_messages_of_lightning_stand_on_lines_of_their_own(
    slow_module, loader_of, batches_of, trainer_with, console, monkeypatch
):
    """Lightning's handler keeps the stream that was ``sys.stderr`` when it was made; the line is redrawn below."""
    terminal, direct = console(terminal=True).file, io.StringIO()
    monkeypatch.setattr(sys, "stderr", direct)
    handler = logging.StreamHandler(direct)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [handler])
    fit(trainer_with, slow_module(), loader_of, batches_of, LMProgressBar(), steps=3)
    assert "\n`Trainer.fit` stopped" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", terminal.getvalue())
    assert "stopped" not in direct.getvalue()
    assert (sys.stderr, handler.stream) == (direct, direct)

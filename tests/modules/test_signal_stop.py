"""Signals end a run at the end of its step, saved; the run that resumes ends as one without a signal."""

import copy
import multiprocessing
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from robustness.signal_trials import Trial, execute

from lightning_lm.callbacks import EMA, LastCheckpoint
from lightning_lm.data import tokenize
from lightning_lm.datamodules import TextDataModule
from lightning_lm.errors import RunStopped
from lightning_lm.models import TransformerConfig
from lightning_lm.modules import GRPOModule, PretrainModule, RolloutPlan, signals
from lightning_lm.modules.signal_stop import SignalStop
from lightning_lm.modules.signals import stop_signals
from lightning_lm.optim import AdamW, Constant
from lightning_lm.strategies import AtomicCheckpointIO, BackgroundCheckpointIO
from lightning_lm.tokenizers import Bytes, ByteTokenizer
from lightning_lm.tokenizers.bpe import BPETokenizer

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TEXTS = ["one two three four " * 9, "five six seven eight " * 9]


class SignalAt(Callback):
    """Sends this process a signal in the hook and at the step that are given."""

    def __init__(self, hook, step, signum=signal.SIGTERM):
        self.step, self.signum = step, signum
        setattr(self, hook, self._send)

    def _send(self, trainer, *_):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), self.signum)
            while not stop_signals.received:  # the thread, or the handler, is about to note it
                time.sleep(0.001)


class Losses(Callback):
    def __init__(self):
        self.seen = {}

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen[trainer.global_step] = float(trainer.callback_metrics["val/loss"])


@pytest.fixture(autouse=True)
def _same_handlers():
    """Compare the handlers before and after a test."""
    before = [signal.getsignal(signum) for signum in SIGNALS]
    yield
    assert not stop_signals.installed
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


@pytest.fixture
def fit(make_trainer):
    """Return a function that trains for ten steps, validates every third and returns module, losses and trainer."""

    def fit(*callbacks, saver, path=None, plugin=AtomicCheckpointIO, **settings):
        config = TransformerConfig(d_model=16, num_layers=1, context_length=16)
        torch.manual_seed(0)
        module, losses = PretrainModule(config, schedule=Constant()), Losses()
        data = TextDataModule(TEXTS, TEXTS, tokenizer=Bytes(), context_length=16, batch_size=2)
        settings = {"max_steps": 10, "val_check_interval": 3, "max_epochs": -1, "log_every_n_steps": 1} | settings
        settings |= {"enable_checkpointing": True, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1}
        trainer = make_trainer(callbacks=[losses, saver, *callbacks], plugins=[plugin()], **settings)
        stop = None
        try:
            trainer.fit(module, data, ckpt_path=path)
        except RunStopped as error:
            stop = error
        return module, losses.seen, trainer, stop

    return fit


def equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


MOMENTS = [
    ("on_train_batch_start", 4, signal.SIGTERM, 5),
    ("on_train_batch_end", 3, signal.SIGINT, 3),
    ("on_validation_batch_end", 6, signal.SIGUSR1, 6),
    ("on_validation_end", 6, signal.SIGTERM, 7),
    ("on_before_optimizer_step", 9, signal.SIGTERM, 10),
]


@pytest.mark.parametrize(("hook", "step", "signum", "saved"), MOMENTS)
def test_the_step_ends_and_the_continuation_is_the_same_run(fit, tmp_path, capfd, hook, step, signum, saved):
    whole, losses, _, _ = fit(saver=LastCheckpoint(100, tmp_path / "whole"))
    at = SignalAt(hook, step, signum)
    _, before, trainer, stop = fit(at, saver=LastCheckpoint(100, tmp_path / "first"))
    assert (stop.signum, stop.code, trainer.global_step) == (signum, 128 + signum, saved)
    printed = capfd.readouterr().err
    path = tmp_path / "first" / "last.ckpt"
    assert f"was stopped by {signum.name} after step {saved}" in printed
    assert f"trainer.fit(module, datamodule=datamodule, ckpt_path='{path}')" in printed
    rest, after, _, stop = fit(saver=LastCheckpoint(100, tmp_path / "rest"), path=path)
    assert stop is None
    assert equal(rest, whole)
    if hook != "on_train_batch_end":  # saved before the validation of that step, which a resumed run leaves out
        assert before | after == losses


def test_an_average_in_the_place_of_the_weights_is_not_saved_as_them(fit, tmp_path):
    whole, _, _, _ = fit(EMA(0.5), saver=LastCheckpoint(100, tmp_path / "whole"))
    fit(EMA(0.5), SignalAt("on_validation_batch_end", 6), saver=LastCheckpoint(100, tmp_path / "first"))
    rest, _, _, _ = fit(EMA(0.5), saver=LastCheckpoint(100, tmp_path), path=tmp_path / "first" / "last.ckpt")
    assert equal(rest, whole)


@pytest.mark.parametrize("plugin", [AtomicCheckpointIO, BackgroundCheckpointIO])
@pytest.mark.parametrize("save_last", [True, None])
def test_a_callback_of_lightning_saves_too(fit, tmp_path, capfd, save_last, plugin):
    """The file is there when it is said, also if it is written in the background."""
    stopping = SignalAt("on_train_batch_start", 4)
    stopping.setup = lambda trainer, *_, **__: SignalStop.attach(trainer)
    saver = ModelCheckpoint(tmp_path, save_last=save_last, every_n_train_steps=2)
    _, _, _, stop = fit(stopping, saver=saver, plugin=plugin)
    assert stop.code == 143
    assert f"Saved {tmp_path / 'last.ckpt'}" in capfd.readouterr().err
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 5


def test_before_the_first_step_a_run_just_ends(fit, tmp_path, capfd):
    _, _, trainer, stop = fit(SignalAt("on_fit_start", 0), saver=LastCheckpoint(100, tmp_path))
    assert (stop.code, trainer.global_step, list(tmp_path.glob("*.ckpt"))) == (143, 0, [])
    assert "before the first step, so there is nothing to save" in capfd.readouterr().err


class Copies(Callback):
    def on_train_start(self, trainer, pl_module):
        (stopper,) = (callback for callback in trainer.callbacks if isinstance(callback, SignalStop))
        self.copies = [copy.deepcopy(stopper), pickle.loads(pickle.dumps(stopper))]
        assert stop_signals.installed


def test_a_copy_has_taken_over_no_signals(fit, tmp_path):
    """Callbacks are copied with their Trainer, also while it runs."""
    copies = Copies()
    _, _, trainer, stop = fit(copies, saver=LastCheckpoint(100, tmp_path), max_steps=2)
    assert (stop, trainer.global_step) == (None, 2)
    assert [type(one) for one in copies.copies] == [SignalStop, SignalStop]


def test_handlers_of_the_user_stay_theirs(fit, tmp_path):
    seen = []
    own = {signum: lambda number, frame: seen.append(number) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    before = {signum: signal.signal(signum, handler) for signum, handler in own.items()}
    try:
        usr = SignalAt("on_train_batch_start", 2, signal.SIGTERM)
        usr.on_train_start = lambda *_: os.kill(os.getpid(), signal.SIGUSR1)
        _, _, _, stop = fit(usr, saver=LastCheckpoint(100, tmp_path))
        assert stop.signum == signal.SIGTERM
        assert seen == [signal.SIGUSR1, signal.SIGTERM]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_a_second_signal_ends_a_process_that_hangs(monkeypatch):
    """Terminals and launchers both pass a signal on, so one within a second is no second one."""
    monkeypatch.setattr(signals, "_SAME_S", 0.0)
    child = os.fork()
    if child == 0:
        stop_signals.install(announce=lambda name: os.kill(os.getpid(), signal.SIGINT))
        stop_signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_a_signal_that_is_read_late_stops_no_later_run(monkeypatch):
    """The thread that sees signals may get its turn only when the run that they stopped has ended."""
    next_run, read = threading.Event(), os.read

    def read_late(*arguments):
        received = read(*arguments)
        next_run.wait(0.2)
        return received

    monkeypatch.setattr(signals.os, "read", read_late)
    told = []
    stop_signals.install(announce=lambda name: None)
    stop_signals.defer()
    os.kill(os.getpid(), signal.SIGTERM)
    (reader,) = (thread for thread in threading.enumerate() if thread.name == "stop-signals")
    stop_signals.restore()
    stop_signals.install(announce=told.append)
    stop_signals.defer()
    next_run.set()
    reader.join()
    received = stop_signals.received
    stop_signals.restore()
    assert (received, told) == (0, [])


def stopped_at(texts, place):
    for number, text in enumerate(texts):
        if number == place:
            os.kill(os.getpid(), signal.SIGTERM)
        yield text


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_signal_ends_tokenizing_with_its_processes_and_the_next_call_goes_on(tmp_path, num_workers):
    texts, tokenizer = [f"text {number}" for number in range(5000)], ByteTokenizer()
    settings = {"num_workers": num_workers, "show_progress": False}
    others = set(multiprocessing.active_children())  # ranks of earlier tests, which are kept
    with pytest.raises(RunStopped), stop_signals.handled():
        tokenize(stopped_at(texts, 4000), tokenizer, tmp_path / "store", **settings)
    assert set(multiprocessing.active_children()) <= others
    store = tokenize(texts, tokenizer, tmp_path / "store", **settings)
    assert len(store) == 5000
    assert store[4321].tolist() == [*b"text 4321", tokenizer.eos_id]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_signal_ends_the_training_of_a_tokenizer_with_its_processes(num_workers):
    before = threading.active_count()
    with pytest.raises(RunStopped), stop_signals.handled():
        BPETokenizer.train(stopped_at(["the cat sat on the mat " * 9] * 5000, 4000), 300, num_workers=num_workers)
    children = Path("/proc/self/task").glob("*/children")
    running = [pid for found in children for pid in found.read_text().split()]
    names = [Path(f"/proc/{pid}/cmdline").read_text() for pid in running]
    assert not [name for name in names if "word_count" in name]
    assert threading.active_count() <= before


class Rewards:
    """The share of ones; the call of a given index gets a signal, and would last ten minutes."""

    def __init__(self, signal_at=None):
        self.calls, self.signal_at = 0, signal_at

    def __call__(self, *, completions, **columns):
        self.calls += 1
        if self.calls == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        return [completion.count("1") / 5 for completion in completions]


@pytest.fixture
def grpo(policy, prompt_data, make_trainer, tmp_path):
    """Return a function that trains a policy for five rollouts of two steps."""

    def fit(folder, *callbacks, rewards=None, path=None):
        plan = RolloutPlan(samples_per_prompt=6, max_new_tokens=5, minibatches=2)
        fast = AdamW(lr=1e-2, weight_decay=0.0)
        module = GRPOModule(policy(), rewards=[rewards or Rewards()], plan=plan, optimizer=fast, schedule=Constant())
        trainer = make_trainer(
            max_steps=10,
            max_epochs=-1,
            callbacks=[LastCheckpoint(100, tmp_path / folder), *callbacks],
            enable_checkpointing=True,
            val_check_interval=2,
            check_val_every_n_epoch=None,
        )
        stop = None
        try:
            trainer.fit(module, prompt_data(), ckpt_path=path)
        except RunStopped as error:
            stop = error
        return module, trainer, stop

    return fit


STOPS = {
    "in the third rollout": ((), 5, 4),
    "between the steps of a rollout, which ends first": ((SignalAt("on_train_batch_start", 5),), None, 6),
    "in a validation": ((), 4, 4),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_rollout_is_left_at_once_and_sampled_again(grpo, tmp_path, stop):
    callbacks, call, step = STOPS[stop]
    began_s = time.monotonic()
    _, trainer, stopped = grpo("first", *callbacks, rewards=Rewards(call))
    assert (stopped.code, trainer.global_step) == (143, step)
    assert time.monotonic() - began_s < 300
    rest, trainer, _ = grpo("rest", path=tmp_path / "first" / "last.ckpt")
    whole, _, _ = grpo("whole")
    assert trainer.global_step == 10
    assert equal(rest, whole)


def test_a_launched_run_on_two_ranks(tmp_path):
    outcome = execute(tmp_path, Trial("lightning", "zero2", signal.SIGTERM))
    assert outcome.status == 143, outcome.output
    assert outcome.step >= 4
    assert f"was stopped by SIGTERM after step {outcome.step}. Saved runs/run/version_0/" in outcome.output
    assert "lightning-lm fit --config runs/run/version_0/config.yaml --ckpt_path runs/run" in outcome.output
    assert "Traceback" not in outcome.output

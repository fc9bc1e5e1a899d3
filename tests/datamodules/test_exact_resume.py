"""A run that was stopped anywhere and resumed is the run that was not stopped, bit for bit."""

import contextlib
import os
import random
import signal

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lm.errors import FingerprintError
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import Muon

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class InterruptionError(Exception):
    """Stops a run where a kill would."""


class StopAfter(Callback):
    """Saves a checkpoint after a number of micro-batches, and stops."""

    def __init__(self, batches, path):
        self.left, self.path = batches, path

    def on_train_batch_end(self, trainer, *_):
        self.left -= 1
        if not self.left:
            trainer.save_checkpoint(self.path)
            raise InterruptionError


class FailDuring(StopAfter):
    """Saves a checkpoint in the middle of a micro-batch, as an exception would leave it."""

    def on_before_backward(self, trainer, *_):
        self.on_train_batch_end(trainer)

    def on_train_batch_end(self, *arguments):
        if len(arguments) == 1:
            super().on_train_batch_end(*arguments)


class AfterValidation(ModelCheckpoint):
    """Another class, for Lightning to tell the two apart."""


def trainer_of(callbacks=(), **limits):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **limits,
    )


@pytest.fixture
def run(make_data, make_noting, tmp_path):
    """Return a function that trains to the end or until it is stopped, and returns module, trainer and data."""

    def train(*, stop=None, resume=False, stopper=StopAfter, data=None, **limits):
        module, path, data = make_noting(), tmp_path / "stopped.ckpt", data or make_data()
        trainer = trainer_of([stopper(stop, path)] if stop else [], **limits)
        with contextlib.suppress(InterruptionError):
            trainer.fit(module, data, ckpt_path=path if resume else None, weights_only=True)
        return module, trainer, data

    return train


def rows_by_step(*modules):
    """Return the rows of each optimizer step; where a step was begun twice, those of the second time."""
    steps = {}
    for module in modules:
        own = {}
        for step, _, rows, _ in module.seen:
            own.setdefault(step, []).extend(rows)
        steps.update(own)
    return {step: sorted(rows) for step, rows in steps.items()}


def equal_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def stops(batches_per_epoch, last):
    """Return moments worth stopping at: the first ones, those about an epoch's end, the last ones, and some others."""
    near = {1, 2, 3, batches_per_epoch - 1, batches_per_epoch, batches_per_epoch + 1, last - 1}
    return sorted(near | set(random.Random(0).sample(range(4, last - 1), 2)))


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_steps": 25}], ids=["epochs", "steps"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_losses_and_weights_are_bit_equal(run, limits, accumulate):
    how = {**limits, "accumulate_grad_batches": accumulate}
    whole, trainer, data = run(**how)
    for stop in stops(len(data.train_dataloader()), len(whole.seen)):
        first, *_ = run(stop=stop, **how)
        second, resumed, resumed_data = run(resume=True, **how)
        kept = stop - stop % accumulate
        assert first.seen[:kept] + second.seen == whole.seen
        assert equal_weights(second, whole)
        assert resumed.global_step == trainer.global_step
        assert resumed.current_epoch == trainer.current_epoch
        assert resumed_data.samples_consumed == data.samples_consumed == 8 * trainer.global_step


@pytest.mark.parametrize("stop", [7, 30])
def test_our_module_resumes_bit_for_bit(make_data, tmp_path, stop):
    def train(callbacks=(), ckpt_path=None):
        torch.manual_seed(1)
        layer = Layer(mixer=Attention(num_heads=2), ffn=GLU())
        module = PretrainModule(TransformerConfig(d_model=16, num_layers=2, layers=layer), optimizer=Muon(lr=0.02))
        trainer = trainer_of(callbacks, max_steps=10, accumulate_grad_batches=4, gradient_clip_val=1.0)
        with contextlib.suppress(InterruptionError):
            trainer.fit(module, make_data(), ckpt_path=ckpt_path, weights_only=True)
        return module

    whole = train()
    train([StopAfter(stop, tmp_path / "stopped.ckpt")])
    assert equal_weights(train(ckpt_path=tmp_path / "stopped.ckpt"), whole)


def test_workers_change_nothing(run, make_data):
    whole, *_ = run(max_epochs=2)
    first, *_ = run(max_epochs=2, stop=15, data=make_data(num_workers=2))
    second, *_ = run(max_epochs=2, resume=True, data=make_data(num_workers=1))
    assert first.seen + second.seen == whole.seen
    assert equal_weights(second, whole)


@pytest.mark.parametrize("stop", [4, 6, 43])
def test_an_exception_within_a_step_loses_none_of_its_rows(run, stop):
    how = {"max_epochs": 2, "accumulate_grad_batches": 4}
    whole, *_ = run(**how)
    first, *_ = run(stop=stop, stopper=FailDuring, **how)
    second, *_ = run(resume=True, **how)
    assert first.seen[: (stop - 1) // 4 * 4] + second.seen == whole.seen
    assert equal_weights(second, whole)


@pytest.mark.parametrize(("was", "now"), [(4, 1), (1, 4), (2, 8)])
def test_other_micro_batches_read_the_same_rows_in_the_same_steps(run, was, now):
    whole, trainer, _ = run(max_epochs=2)
    for stop in (1, was + 1, 10 * was, 11 * was, 11 * was + 1, 20 * was - 1):
        first, *_ = run(max_epochs=2, stop=stop, accumulate_grad_batches=was)
        second, resumed, _ = run(max_epochs=2, resume=True, accumulate_grad_batches=now)
        assert rows_by_step(first, second) == rows_by_step(whole)
        assert (resumed.global_step, resumed.current_epoch) == (trainer.global_step, trainer.current_epoch)


def test_a_larger_batch_goes_on_from_the_same_row(run, make_data):
    run(max_epochs=2, stop=8)
    second, trainer, data = run(max_epochs=2, resume=True, data=make_data(batch_size=16))
    stream = data._train
    first_batch = [hash(tuple(row)) for row in stream.batch(torch.arange(64, 80).numpy())["input_ids"].tolist()]
    assert second.seen[0][2] == first_batch
    assert data.samples_consumed == 64 + 16 * (2 * len(data.train_dataloader()) - 4)
    assert trainer.current_epoch == 2


def test_checkpoints_of_every_kind_resume(run, make_data, make_noting, tmp_path):
    """Written after a step, after validation in and at the end of an epoch, and at the end of training."""
    whole = make_noting()
    callbacks = [
        ModelCheckpoint(tmp_path / "steps", every_n_train_steps=4, save_top_k=-1),
        AfterValidation(tmp_path / "validation", save_top_k=-1, filename="{step}"),
        ModelCheckpoint(tmp_path / "epochs", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1),
    ]
    limits = {"max_epochs": 2, "accumulate_grad_batches": 2}
    trainer = trainer_of(callbacks, val_check_interval=9, **limits)
    trainer.fit(whole, make_data(validation=0.2))
    paths = sorted(tmp_path.rglob("*.ckpt"))
    assert len(paths) == 5 + 4 + 2
    for path in paths:
        second = make_noting()
        again = trainer_of(val_check_interval=9, **limits)
        again.fit(second, make_data(validation=0.2), ckpt_path=path, weights_only=True)
        assert second.seen == whole.seen[len(whole.seen) - len(second.seen) :]
        assert equal_weights(second, whole)
        assert again.global_step == trainer.global_step


def test_killed_at_a_random_moment_and_resumed(make_data, make_noting, tmp_path):
    """A real process, really killed while it trains, and then another that finds what it left."""
    whole = make_noting()
    trainer_of(max_steps=20, accumulate_grad_batches=2).fit(whole, make_data())

    class Kill(Callback):
        def on_before_optimizer_step(self, trainer, *_):
            if trainer.global_step == random.Random(3).randrange(5, 15):
                os.kill(os.getpid(), signal.SIGKILL)

    saving = {"dirpath": tmp_path, "every_n_train_steps": 1, "filename": "last", "enable_version_counter": False}
    pid = os.fork()
    if pid == 0:
        try:
            callbacks = [ModelCheckpoint(**saving), Kill()]
            trainer_of(callbacks, max_steps=20, accumulate_grad_batches=2).fit(make_noting(), make_data(num_workers=2))
        finally:
            os._exit(70)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    second = make_noting()
    resumed = trainer_of(max_steps=20, accumulate_grad_batches=2)
    resumed.fit(second, make_data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert 0 < len(second.seen) < len(whole.seen)
    assert second.seen == whole.seen[len(whole.seen) - len(second.seen) :]
    assert equal_weights(second, whole)


def test_from_one_rank_to_two_the_steps_read_the_same_rows(run, make_data, make_noting, tmp_path):
    whole, *_ = run(max_steps=18, accumulate_grad_batches=2)
    first, *_ = run(max_steps=18, accumulate_grad_batches=2, stop=25)

    class WriteDown(Callback):
        def on_train_end(self, trainer, module):
            torch.save(module.seen, tmp_path / f"rank-{trainer.global_rank}")

    trainer = trainer_of([WriteDown()], max_steps=18, strategy="ddp_fork", devices=2)
    trainer.fit(make_noting(), make_data(), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    ranks = []
    for rank in (0, 1):
        module = make_noting()
        module.seen = torch.load(tmp_path / f"rank-{rank}", weights_only=True)
        ranks.append(module)
    steps = rows_by_step(ranks[0])
    other = rows_by_step(ranks[1])
    assert {step: sorted(steps[step] + other[step]) for step in steps} == {
        step: rows for step, rows in rows_by_step(first, whole).items() if step >= 12
    }


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"context_length": 16}, "row_length was 33, is 17"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"train": ["other text"] * 40}, "corpus was"),
    ],
)
def test_other_rows_are_refused_and_taken_when_asked(run, make_data, change, what):
    run(max_steps=10, stop=5)
    with pytest.raises(FingerprintError, match=what) as caught:
        run(max_steps=10, resume=True, data=make_data(**change))
    assert "accept_changed_data=True" in str(caught.value)
    with pytest.warns(UserWarning, match="row 40 of the new rows"):
        _, trainer, data = run(max_steps=10, resume=True, data=make_data(**change, accept_changed_data=True))
    assert (trainer.global_step, data.samples_consumed) == (10, 80)


def test_a_checkpoint_can_be_validated_on_any_text(run, make_data, make_noting, tmp_path):
    run(max_steps=10, stop=5)
    data = make_data(["quite another text"] * 9, 0.3, context_length=16)
    module = make_noting()
    trainer_of().validate(module, data, ckpt_path=tmp_path / "stopped.ckpt", verbose=False, weights_only=True)
    assert module.targets

"""The average against a loop, and that it goes on from a checkpoint."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from split_runs import Rows, model_config, run

from lightning_lm.callbacks import EMA, LastCheckpoint
from lightning_lm.errors import ConfigurationError
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import AdamW, Constant


class History(Callback):
    def __init__(self):
        self.weights = []

    def on_train_start(self, trainer, module):
        self.on_train_batch_end(trainer, module, None, None, 0)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.weights.append({name: value.detach().clone() for name, value in module.named_parameters()})


def expected_of(history, decay):
    average = dict(history.weights[0])
    for weights in history.weights[1:]:
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    return average


def test_training_ends_with_the_average():
    history = History()
    _, _, weights = run(callbacks=[history, EMA(0.7)])
    for name, average in expected_of(history, 0.7).items():
        torch.testing.assert_close(weights[name], average, rtol=0, atol=1e-12)


def test_it_does_not_change_what_is_trained():
    assert run(callbacks=[EMA(0.9)])[0] == run()[0]


def test_a_checkpoint_takes_it_along(tmp_path):
    whole = run(callbacks=[EMA(0.7)])[2]
    keep = SaveAt(2, tmp_path / "a.ckpt")
    run(callbacks=[EMA(0.7), keep])
    resumed = run(callbacks=[EMA(0.7)], ckpt_path=tmp_path / "a.ckpt")[2]
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("moment", ["on_train_end", "on_validation_batch_end", "after"])
def test_every_checkpoint_resumes_bit_for_bit(tmp_path, moment):
    """Also one that is written while the average is validated, at the very end or after it."""

    def trainer(steps, *callbacks):
        return Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            val_check_interval=5,
            limit_val_batches=1,
            use_distributed_sampler=False,
            default_root_dir=tmp_path,
        )

    def fit(steps, *callbacks, **options):
        torch.manual_seed(0)
        one = trainer(steps, *callbacks)
        module = PretrainModule(model_config().build(), optimizer=AdamW(lr=0.01), schedule=Constant())
        rows = Rows(one, 20, 96)
        one.fit(module, rows, rows, **options)
        return one, module

    class Save(Callback):
        def on_train_end(self, trainer, module):
            if moment == "on_train_end":
                trainer.save_checkpoint(tmp_path / "a.ckpt")

        def on_validation_batch_end(self, trainer, *args):
            if moment == "on_validation_batch_end" and trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    kept = History()
    _, expected = fit(10, EMA(0.95), kept)
    first, module = fit(5, EMA(0.95), Save())
    if moment == "after":
        first.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for name, weight in kept.weights[5].items():
        assert torch.equal(saved["state_dict"][name], weight)
        assert torch.equal(saved["lightning_lm_ema"][name], module.get_parameter(name))
    _, resumed = fit(10, EMA(0.95), ckpt_path=tmp_path / "a.ckpt")
    for name, weight in expected.named_parameters():
        assert torch.equal(resumed.get_parameter(name), weight)


def test_last_checkpoint_has_the_weights_at_every_step_of_the_run(tmp_path):
    for steps in (20, 25):
        history, last = History(), LastCheckpoint(10, tmp_path / str(steps))
        run(steps=steps, callbacks=[EMA(0.9), history, last], enable_checkpointing=True)
        saved = torch.load(last.last_model_path, weights_only=True)
        assert saved["global_step"] == steps
        for name, weight in history.weights[-1].items():
            assert torch.equal(saved["state_dict"][name], weight)
        for name, average in expected_of(history, 0.9).items():
            torch.testing.assert_close(saved["lightning_lm_ema"][name], average, rtol=0, atol=1e-12)


def test_a_short_run_is_not_its_initial_weights():
    """After 30 steps a plain decay of 0.999 would keep 97 % of them; the warm-up keeps 4 % (0.9 ** 30)."""
    history = History()
    _, _, weights = run(steps=30, callbacks=[history, EMA()])
    for name, average in expected_of(history, 0.9).items():
        torch.testing.assert_close(weights[name], average, rtol=0, atol=1e-12)
    plain = History()
    _, _, weights = run(steps=30, callbacks=[plain, EMA(warmup=False)])
    for name, average in expected_of(plain, 0.999).items():
        torch.testing.assert_close(weights[name], average, rtol=0, atol=1e-12)


class Unfreeze(Callback):
    """Trains the embedding from the third step on."""

    def on_train_start(self, trainer, module):
        module.model.embed.weight.requires_grad = False

    def on_train_batch_end(self, trainer, module, *args):
        module.model.embed.weight.requires_grad = trainer.global_step >= 2


def test_a_parameter_that_is_unfrozen_later_starts_with_its_weights():
    history = History()
    _, _, weights = run(steps=6, callbacks=[Unfreeze(), history, EMA(0.7)])
    name = "model.embed.weight"
    average = history.weights[2][name]
    for step in history.weights[3:]:
        average = 0.7 * average + 0.3 * step[name]
    torch.testing.assert_close(weights[name], average, rtol=0, atol=1e-12)


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_decay_outside_of_its_range():
    with pytest.raises(ConfigurationError, match="from 0 to 1"):
        EMA(1.5)

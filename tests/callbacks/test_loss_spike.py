"""Spikes in losses that are made here."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lm.callbacks import LossSpike
from lightning_lm.errors import ConfigurationError

CALM = [5.0 - 0.01 * i for i in range(40)]


@pytest.fixture
def fit(foreign_module, batches_of, loader_of, trainer_with, record_of):
    def run(losses, *callbacks, ckpt_path=None, **options):
        class Scripted(foreign_module):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) * 0 + losses[batch_idx]

        record = record_of()
        options = {"log_every_n_steps": 1, "max_steps": len(losses), "logger": record} | options
        trainer = trainer_with(*callbacks, **options)
        trainer.fit(Scripted(), loader_of(batches_of([(2, 5)] * len(losses))), ckpt_path=ckpt_path)
        return trainer, record

    return run


def test_a_jump_is_counted_and_a_calm_loss_is_not(fit):
    calm = LossSpike()
    fit(CALM, calm)
    assert calm.spikes == 0
    losses = [*CALM[:30], 9.0, *CALM[30:35], 9.0, *CALM[35:]]
    spiky = LossSpike()
    with pytest.warns(UserWarning, match="Loss spike at step 31: 9, where 4.85"):
        _, record = fit(losses, spiky)
    assert spiky.spikes == 2
    assert record.metrics[-1][1]["train/loss_spikes"] == 2.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_a_spike_from_the_first_step(fit, bad):
    spike = LossSpike()
    with pytest.warns(UserWarning, match="Loss spike at step 1"):
        fit([bad, 5.0, 5.0], spike)
    assert spike.spikes == 1


def test_it_can_end_the_run(fit):
    with pytest.warns(UserWarning, match="Loss spike"):
        trainer, _ = fit([*CALM, 20.0, 5.0, 5.0], LossSpike(stop=True))
    assert trainer.global_step == len(CALM) + 1


def test_between_logs_losses_are_averaged(fit):
    """A single loss of 5.5 among nine of 4.8 raises the mean of ten by 0.07: no spike."""
    losses = [*([4.8] * 200), *([4.8] * 9), 5.5]
    few = LossSpike()
    fit(losses, few, log_every_n_steps=10)
    assert few.spikes == 0


def test_count_and_losses_survive_a_checkpoint(fit, tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    with pytest.warns(UserWarning, match="Loss spike"):
        fit([*CALM[:30], 9.0], LossSpike(), save, enable_checkpointing=True)
    resumed = LossSpike()
    with pytest.warns(UserWarning, match="Loss spike at step 32"):
        fit([*CALM[:30], 9.0, 9.0], resumed, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.spikes == 2


def test_a_window_needs_a_spread():
    with pytest.raises(ConfigurationError, match="window=1"):
        LossSpike(window=1)


def test_a_logged_mean_of_the_epoch_before_hides_no_spike(fit, foreign_module):
    """Whatever the module logs, under whatever name and of whatever age, the losses of its steps count."""

    class Logs(LossSpike):
        def on_train_batch_end(self, trainer, *args):
            trainer.callback_metrics["train/loss"] = trainer.callback_metrics["train_loss"] = torch.tensor(1.0)
            super().on_train_batch_end(trainer, *args)

    callback = Logs()
    fit([*CALM, 100.0], callback)
    assert callback.spikes == 1

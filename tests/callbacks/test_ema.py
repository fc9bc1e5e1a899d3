"""The average against a loop, and that it goes on from a checkpoint."""

import pytest
import torch
from lightning.pytorch import Callback
from split_runs import run

from lightning_lm.callbacks import EMA
from lightning_lm.errors import ConfigurationError


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


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_decay_outside_of_its_range():
    with pytest.raises(ConfigurationError, match="from 0 to 1"):
        EMA(1.5)

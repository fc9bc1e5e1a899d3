"""A run that SIGKILL ends while it samples or learns from a rollout goes on from its newest checkpoint."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lm.modules import GRPOModule, KLReward, PPOModule, RolloutPlan
from lightning_lm.optim import AdamW, Constant
from lightning_lm.strategies import AtomicCheckpointIO

PLAN = RolloutPlan(samples_per_prompt=6, max_new_tokens=5, minibatches=2)
KINDS = {"grpo": (GRPOModule, {}), "ppo": (PPOModule, {"kl": KLReward(target=0.01, horizon=100)})}


def share_of_ones(*, completions, **columns):
    return [completion.count("1") / 5 for completion in completions]


class Fatal:
    """A reward that ends the process the third time it is asked, with no chance to clean up."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *, completions, **columns):
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return share_of_ones(completions=completions)


class DieWithin(Callback):
    """Ends the process between the two steps of the third rollout."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


class Steps(Callback):
    def __init__(self):
        self.seen, self.ages = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(trainer.global_step)
        self.ages.append(trainer.global_step - 1 - batch["policy_version"])


@pytest.fixture
def run(policy, prompt_data, make_trainer, tmp_path):
    def fit(kind, folder, *, reward=share_of_ones, path=None, callbacks=()):
        module_class, settings = KINDS[kind]
        fast = AdamW(lr=1e-2, weight_decay=0.0)
        module = module_class(policy(), rewards=[reward], plan=PLAN, optimizer=fast, schedule=Constant(), **settings)
        saved = ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        steps = Steps()
        trainer = make_trainer(
            max_steps=10,
            max_epochs=-1,
            callbacks=[saved, steps, *callbacks],
            enable_checkpointing=True,
            plugins=[AtomicCheckpointIO()],
            limit_val_batches=0,
        )
        trainer.fit(module, prompt_data(), ckpt_path=path, weights_only=True)
        return module, trainer, steps

    return fit


def killed(act):
    """Run in a process of its own, which must end by the signal."""
    child = os.fork()
    if child == 0:
        act()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def files(folder):
    return {path.name for path in folder.iterdir()}


def steps_of(*numbers):
    return {f"step={number}.ckpt" for number in numbers}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_it_samples(run, tmp_path, kind):
    killed(lambda: run(kind, "killed", reward=Fatal()))
    assert files(tmp_path / "killed") == steps_of(1, 2, 3, 4)
    resumed, trainer, steps = run(kind, "rest", path=tmp_path / "killed" / "step=4.ckpt")
    whole, _, _ = run(kind, "whole")
    assert trainer.global_step == 10
    assert steps.seen == [5, 6, 7, 8, 9, 10]
    assert files(tmp_path / "rest") == steps_of(5, 6, 7, 8, 9, 10)
    wanted = whole.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_killed_between_the_steps_of_a_rollout(run, tmp_path, kind):
    """What is left of that rollout is dropped, and said to be; every later one is whole and fresh."""
    killed(lambda: run(kind, "killed", callbacks=[DieWithin()]))
    assert files(tmp_path / "killed") == steps_of(1, 2, 3, 4, 5)
    with pytest.warns(UserWarning, match="its last 1 of 2 micro-batches are dropped"):
        _, trainer, steps = run(kind, "rest", path=tmp_path / "killed" / "step=5.ckpt")
    assert trainer.global_step == 10
    assert steps.seen == [6, 7, 8, 9, 10]
    assert steps.ages == [0, 1, 0, 1, 0]
    assert trainer.datamodule.prompts_consumed == 4 * 6
    assert files(tmp_path / "rest") == steps_of(6, 7, 8, 9, 10)

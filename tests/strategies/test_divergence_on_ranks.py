"""Something that is not finite on one rank ends the run on all of them, and no checkpoint holds it."""

import functools
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from split_runs import STRATEGIES, model_config, run
from torch import distributed

from lightning_lm.callbacks import LastCheckpoint
from lightning_lm.errors import ConfigurationError, DivergenceError
from lightning_lm.functional.dtensor import local_part
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import SGD, Constant
from lightning_lm.strategies import AtomicCheckpointIO, ShardedOptimizer, ShardedOptimizerStrategy

CONFIG = model_config(num_layers=1)
SHARDED = [name for name in STRATEGIES if name not in ("one", "tp2 sp")]
BAD = 3
"""The optimizer step that goes wrong."""


class PoisonedLoss(PretrainModule):
    """The loss of the last rank has a gradient that is not finite, or is itself not finite."""

    loss_too = False

    def training_loss(self, batch):
        loss = super().training_loss(batch)
        if self.trainer.global_step != BAD - 1 or distributed.get_rank() == 0:
            return loss
        nll_sum = loss.nll_sum * math.nan if self.loss_too else loss.nll_sum
        return loss._replace(loss_sum=loss.loss_sum * math.nan, nll_sum=nll_sum)


class PoisonedWeight(Callback):
    """One element of a weight is lost on the last rank, as by a fault of its memory."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == BAD and distributed.get_rank() == 1:
            weights = [local_part(weight.detach()) for weight in pl_module.parameters()]
            next(weight for weight in weights if weight.numel()).view(-1)[0] = math.inf


def diverge(name, folder, *, loss_too=False, weight=False, **options):
    kind = PretrainModule if weight else PoisonedLoss
    module = kind(CONFIG, optimizer=SGD(lr=0.1), schedule=Constant())
    module.loss_too = loss_too
    saves = [LastCheckpoint(1, dirpath=folder), *([PoisonedWeight()] if weight else [])]
    options = {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()], "log_every_n_steps": 50, **options}
    with pytest.raises(DivergenceError) as caught:
        run(STRATEGIES[name](), module=module, config=CONFIG, steps=6, callbacks=saves, **options)
    return str(caught.value)


def last(folder):
    checkpoint = AtomicCheckpointIO().load_checkpoint(folder / "last.ckpt")
    assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())
    return checkpoint["global_step"]


@pytest.mark.parametrize("options", [{"loss_too": True}, {"gradient_clip_val": 1.0}, {}, {"weight": True}], ids=str)
@pytest.mark.parametrize("name", SHARDED)
def test_all_ranks_stop_and_the_last_good_checkpoint_stays(ranks, tmp_path, name, options):
    messages = ranks(2).run(diverge, name, tmp_path, **options)
    assert all("not finite" in message for message in messages)
    assert last(tmp_path) == BAD - 1


def with_a_group_of_its_own(size):
    group = distributed.new_group(list(range(size)))
    optimizer = functools.partial(ShardedOptimizer, process_group=group)

    class Module(PretrainModule):
        def configure_optimizers(self):
            return optimizer(torch.optim.SGD(self.parameters(), lr=0.1))

    try:
        run(ShardedOptimizerStrategy(stage=2), module=Module(CONFIG), config=CONFIG, steps=1)
    except ConfigurationError as error:
        return str(error)
    return None


def test_stage_2_refuses_an_optimizer_that_is_sharded_over_other_ranks(ranks):
    *members, other = ranks(3).run(with_a_group_of_its_own, 2)
    for message in members:
        assert "process_group of 2 of 3 ranks" in message
        assert "stage=1" in message
    assert "process_group does not contain this rank" in other
    assert ranks(2).run(with_a_group_of_its_own, 2) == [None, None]  # all ranks, in the same order

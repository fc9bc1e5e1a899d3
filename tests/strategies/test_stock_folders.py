"""Runs go on here from folders that Lightning's own strategies wrote."""

import shutil

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from split_runs import STRATEGIES, trainer_for, weights_of
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_lm.cli import main
from lightning_lm.errors import CheckpointError
from lightning_lm.strategies import AtomicCheckpointIO

STEPS, HALF = 6, 3


class Plain(LightningModule):
    """Two groups of parameters, a schedule, and buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.save_hyperparameters({"width": 8})

    def configure_model(self):
        if type(self.trainer.strategy) is ModelParallelStrategy:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return (self.model(batch) - 1).square().mean()

    def configure_optimizers(self):
        first, *others = self.model.parameters()
        groups = [{"params": others}, {"params": [first], "lr": 0.02, "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)}


class Same:
    """The same rows on every rank."""

    def __init__(self, start):
        self.start = start

    def __iter__(self):
        for step in range(self.start, STEPS):
            yield torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def train(strategy, *, steps=STEPS, ckpt_path=None, save_to=None):
    trainer = trainer_for(strategy, max_steps=steps, plugins=[AtomicCheckpointIO()], use_distributed_sampler=False)
    module = Plain()
    data = Same(0 if ckpt_path is None else HALF)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return weights_of(module)


def train_with_stock(path):
    train(ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), steps=HALF, save_to=path)


def go_on(name, path):
    return train(STRATEGIES[name](), ckpt_path=path)


@pytest.fixture(scope="module")
def stock(ranks, tmp_path_factory):
    path = tmp_path_factory.mktemp("stock") / "half.ckpt"
    ranks(2).run(train_with_stock, path)
    return path


@pytest.fixture(scope="module")
def uninterrupted(ranks):
    return ranks(1).run(train, "auto")[0]


@pytest.mark.parametrize(("name", "size"), [("one", 1), ("ddp", 2), ("zero2", 2), ("fsdp2", 2)])
def test_a_run_goes_on_from_a_stock_folder(ranks, stock, uninterrupted, name, size):
    for weights in ranks(size).run(go_on, name, stock):
        torch.testing.assert_close(weights, uninterrupted, rtol=0, atol=1e-6)


def test_consolidate_makes_a_plain_checkpoint_of_it(ranks, stock, uninterrupted, tmp_path):
    target = tmp_path / "whole.ckpt"
    assert main(["consolidate", str(stock), "--output", str(target)]) == 0
    content = torch.load(target, weights_only=True)
    assert content["global_step"] == HALF
    assert content["hyper_parameters"] == {"width": 8}
    assert [group["params"] for group in content["optimizer_states"][0]["param_groups"]] == [[0, 1, 2, 3, 4], [5]]
    weights = ranks(1).run(train, "auto", ckpt_path=target)[0]
    torch.testing.assert_close(weights, uninterrupted, rtol=0, atol=1e-6)


def test_a_stock_folder_copied_in_part_is_one_error(stock, tmp_path):
    folder = shutil.copytree(stock, tmp_path / "part.ckpt")
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp|cannot be read"):
        AtomicCheckpointIO().load_checkpoint(folder)

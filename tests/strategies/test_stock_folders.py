"""Runs go on here from folders that Lightning's own strategies wrote."""

import io
import logging
import shutil

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from split_runs import STRATEGIES, model_config, trainer_for, weights_of
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_lm.cli import main
from lightning_lm.errors import CheckpointError
from lightning_lm.modules import PretrainModule
from lightning_lm.modules.checkpoint_files import reads_only_stock
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


def test_a_stock_strategy_is_not_given_our_folder(ranks, tmp_path, monkeypatch, capsys):
    """On the command line, which knows path and strategy; a plain Trainer is told as well."""
    monkeypatch.chdir(tmp_path)
    ranks(1).run(save_ours, tmp_path / "ours.ckpt")
    model = ["--model", "PretrainModule", "--model.model", "TransformerConfig", "--model.model.d_model", "16"]
    tiny = [*model, "--model.model.num_layers", "1", "--data", "TextDataModule", "--data.train", "text.txt"]
    (tmp_path / "text.txt").write_text("hello world " * 99)
    options = ["--trainer.strategy", "ModelParallelStrategy", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", None)  # nothing is set up before
    assert main(["fit", *tiny, *options, "--trainer.logger", "false", "--ckpt_path", "ours.ckpt"]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "ModelParallelStrategy of Lightning reads only its own" in said
    assert "lightning-lm consolidate ours.ckpt" in said
    assert [reads_only_stock(STRATEGIES[name]()) for name in ("fsdp2", "zero2")] == [False, False]  # ours do read them
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module, rows = PretrainModule(model_config()), [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]
    with pytest.raises(CheckpointError, match=r"reads files.*lightning-lm consolidate .*ours\.ckpt"):
        trainer.fit(module, rows, ckpt_path=tmp_path / "ours.ckpt")


def resume_with_stock(path):
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    rows = [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]
    trainer = trainer_for(strategy, max_steps=2, use_distributed_sampler=False)
    with pytest.raises(CheckpointError) as refused:
        trainer.fit(PretrainModule(model_config()), rows, ckpt_path=path)
    return str(refused.value)


def test_a_stock_strategy_in_python_names_what_reads_our_folder(ranks, tmp_path):
    ranks(1).run(save_ours, tmp_path / "ours.ckpt")
    (said,) = ranks(1).run(resume_with_stock, tmp_path / "ours.ckpt")
    assert "ModelParallelStrategy of Lightning reads only its own" in said
    assert f"lightning-lm consolidate {tmp_path / 'ours.ckpt'}" in said


@pytest.mark.parametrize("sharded", [False, True])
def test_what_travels_under_mixed_precision_is_said(ranks, sharded):
    (said, _) = ranks(2).run(train_in_mixed_precision, sharded)
    remedy = "MixedPrecisionPolicy(param_dtype=torch.bfloat16)" if sharded else "--trainer.precision bf16-true halves"
    assert said.count("exchange parameters and gradients in float32") == 1
    assert remedy in said


class Sharded(Plain):
    def configure_model(self):
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def train_in_mixed_precision(sharded):
    logger, lines = logging.getLogger("lightning.pytorch.utilities.rank_zero"), io.StringIO()
    handler = logging.StreamHandler(lines)
    logger.addHandler(handler)
    try:
        strategy = STRATEGIES["fsdp2"]()
        trainer = trainer_for(strategy, max_steps=1, precision="bf16-mixed", use_distributed_sampler=False)
        trainer.fit(Sharded() if sharded else Plain(), Same(0))
    finally:
        logger.removeHandler(handler)
    return lines.getvalue()


def save_ours(path):
    train(STRATEGIES["fsdp2"](), steps=1, save_to=path)

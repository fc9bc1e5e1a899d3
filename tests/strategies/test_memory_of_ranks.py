"""The memory of each rank, predicted before training and counted after a step, under every strategy."""

import dataclasses

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.utils.data import DataLoader

from lightning_lm.callbacks import MemoryReport
from lightning_lm.models import TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import AdamW, Muon
from lightning_lm.strategies import ShardedOptimizerStrategy, TensorParallelStrategy

CONFIG = TransformerConfig(vocab_size=64, d_model=16, num_layers=2, context_length=8)
EXACT = ("parameters", "gradients", "optimizer_states")


def fit(strategy, part, folder):
    torch.manual_seed(0)
    report = MemoryReport()
    trainer = Trainer(
        accelerator="cpu",
        devices=distributed.get_world_size(),
        strategy=strategy,
        max_steps=1,
        use_distributed_sampler=False,
        callbacks=[report],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    ids = torch.randint(64, (2, 9))
    trainer.fit(
        PretrainModule(CONFIG, optimizer=part), DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)
    )
    return dataclasses.asdict(report.predicted), dataclasses.asdict(report.measured)


@pytest.mark.parametrize("part", [AdamW(), Muon()])
def test_ranks_of_ddp_hold_everything(ranks, part, tmp_path):
    for predicted, measured in ranks(2).run(fit, DDPStrategy(), part, tmp_path):
        assert predicted["gradients"] == predicted["parameters"]
        assert all(predicted[name] == measured[name] for name in EXACT)


@pytest.mark.parametrize("part", [AdamW(), Muon()])
@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_of_a_sharded_optimizer_hold_their_share(ranks, stage, part, tmp_path):
    whole = ranks(1).run(fit, "auto", part, tmp_path)[0][1]
    found = ranks(2).run(fit, ShardedOptimizerStrategy(stage=stage, min_split_elements=500), part, tmp_path)
    for predicted, measured in found:
        assert all(predicted[name] == measured[name] for name in EXACT)
        assert measured["parameters"] == whole["parameters"]
    for name in ("optimizer_states", "gradients")[:stage]:
        # Rows bring a counter of steps of their own.
        together = sum(measured[name] for _, measured in found)
        assert whole[name] <= together <= whole[name] + 4 * 30
    assert stage == 2 or found[0][1]["gradients"] == whole["gradients"]


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_of_a_mesh_hold_their_shards(ranks, size, tmp_path):
    whole = ranks(1).run(fit, "auto", AdamW(), tmp_path)[0][1]
    for predicted, measured in ranks(2).run(fit, TensorParallelStrategy(tensor_parallel_size=size), AdamW(), tmp_path):
        assert all(predicted[name] == measured[name] for name in EXACT)
        for name in EXACT:
            assert measured[name] < 0.6 * whole[name]

"""The memory of each rank, predicted before training and counted after a step, under every strategy."""

import dataclasses
import gc

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed, nn
from torch.utils.data import DataLoader

from lightning_lm.callbacks import MemoryReport
from lightning_lm.models import TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import AdamW, Muon
from lightning_lm.strategies import ShardedModelStrategy, ShardedOptimizerStrategy, TensorParallelStrategy

CONFIG = TransformerConfig(vocab_size=64, d_model=16, num_layers=2, context_length=8)
EXACT = ("parameters", "gradients", "optimizer_states")


class Accumulated(Callback):
    """Counts the gradients of all parameters that there are after each backward pass, wherever a strategy has them."""

    largest = 0

    def on_fit_start(self, trainer, pl_module):
        gc.collect()
        self.before = self.count()

    def on_after_backward(self, trainer, pl_module):
        self.largest = max(self.largest, self.count() - self.before)

    def count(self):
        found = [part for part in gc.get_objects() if type(part) is nn.Parameter and part.grad is not None]
        return sum(part.grad.nbytes for part in found)


def fit(strategy, part, folder, accumulate=1):
    torch.manual_seed(0)
    report, accumulated = MemoryReport(), Accumulated()
    trainer = Trainer(
        accelerator="cpu",
        devices=distributed.get_world_size(),
        strategy=strategy,
        max_steps=1,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        callbacks=[report, accumulated],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    ids = torch.randint(64, (2, 9))
    loader = DataLoader([{"input_ids": ids, "labels": ids}] * accumulate, batch_size=None)
    trainer.fit(PretrainModule(CONFIG, optimizer=part), loader)
    memory = dataclasses.asdict(report.predicted), dataclasses.asdict(report.measured)
    return memory if accumulate == 1 else (*memory, accumulated.largest)


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


@pytest.mark.parametrize(
    "strategy",
    [ShardedOptimizerStrategy(stage=2, min_split_elements=500), ShardedModelStrategy()],
    ids=["zero2", "fsdp2"],
)
def test_gradients_are_whole_while_micro_batches_add_up(ranks, strategy, tmp_path):
    whole = 4 * sum(parameter.numel() for parameter in CONFIG.build().parameters())
    for predicted, _, accumulated in ranks(2).run(fit, strategy, AdamW(), tmp_path, 2):
        assert predicted["gradients"] == accumulated == whole


@pytest.mark.parametrize(
    "strategy",
    [
        ShardedOptimizerStrategy(stage=2, min_split_elements=500, reduce_every_micro_batch=True),
        TensorParallelStrategy(tensor_parallel_size=2),
    ],
    ids=["zero2, each reduced", "tensor parallel"],
)
def test_gradients_are_shards_where_each_micro_batch_is_reduced_or_none_needs_to_be(ranks, strategy, tmp_path):
    whole = 4 * sum(parameter.numel() for parameter in CONFIG.build().parameters())
    for predicted, measured, _ in ranks(2).run(fit, strategy, AdamW(), tmp_path, 2):
        assert predicted["gradients"] == measured["gradients"] < 0.6 * whole

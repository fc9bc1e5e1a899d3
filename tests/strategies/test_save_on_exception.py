"""Callbacks that save when a run fails, where one rank fails and the others do not: no hang, and nothing half saved."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from optimizer_runs import make_trainer
from torch import distributed
from torch.utils.data import DataLoader
from workers import WorkerError

from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.modules import PipelineModule, PretrainModule
from lightning_lm.strategies import (
    AtomicCheckpointIO,
    PipelineStrategy,
    ShardedOptimizerStrategy,
    TensorParallelStrategy,
)

CONFIG = TransformerConfig(vocab_size=31, d_model=16, num_layers=2, layers=Layer(mixer=Attention(num_heads=2)))


class Line(LightningModule):
    """Knows nothing of this package."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["input_ids"][:, :8].float()).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Failing(Callback):
    """Raises at the fourth step."""

    def __init__(self, fails):
        self.fails = fails

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3 and trainer.global_rank in self.fails:
            raise ValueError("the last straw")


def train(strategy, kind, folder, fails, callback):
    module = kind() if kind is Line else kind(CONFIG)
    saving = [
        ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, save_on_exception=callback == "model"),
        *([OnExceptionCheckpoint(folder)] if callback == "exception" else []),
    ]
    trainer = make_trainer(
        strategy, callbacks=[Failing(fails), *saving], enable_checkpointing=True, plugins=[AtomicCheckpointIO()]
    )
    ids = torch.randint(31, (4, 9))
    trainer.fit(module, DataLoader([{"input_ids": ids, "labels": ids}] * 5, batch_size=None))


CASES = {
    "ddp": ("ddp", PretrainModule, "model"),
    "zero1": (ShardedOptimizerStrategy(), Line, "model"),
    "zero2": (ShardedOptimizerStrategy(stage=2), PretrainModule, "exception"),
    "tensor parallel": (TensorParallelStrategy(tensor_parallel_size=1), Line, "exception"),
    "pipeline": (PipelineStrategy(), PipelineModule, "model"),
}


@pytest.mark.parametrize(("strategy", "kind", "callback"), CASES.values(), ids=CASES)
def test_one_rank_that_fails_says_so_and_saves_nothing(ranks, tmp_path, strategy, kind, callback):
    said = r"Rank 1 of 2 fails with ValueError after 3 steps and saves nothing"
    with pytest.raises(WorkerError, match=rf"the last straw(.|\n)*{said}"):
        ranks(2).run(train, strategy, kind, tmp_path, {1}, callback)
    saved = {path.name for path in tmp_path.iterdir()}
    assert saved == {"step=2.ckpt"}  # what was saved before all of this


def train_alone(folder):
    with pytest.raises(ValueError, match="the last straw"):
        train("auto", PretrainModule, folder, {0}, "model")
    return distributed.get_world_size()


def test_one_process_saves_as_ever(ranks, tmp_path):
    ranks(1).run(train_alone, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step=2.ckpt", "step=3.ckpt"}

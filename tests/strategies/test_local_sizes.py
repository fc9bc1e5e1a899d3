"""Sizes that are told before there are ranks against the tensors that ranks have after a step."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import distributed
from torch.utils.data import DataLoader

from lightning_lm.callbacks import MemoryReport
from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import AdamW, Muon
from lightning_lm.scaling.training_memory import Layout
from lightning_lm.strategies import ShardedModelStrategy, ShardedOptimizerStrategy
from lightning_lm.strategies.local_sizes import local_states

CONFIG = TransformerConfig(
    vocab_size=62, d_model=24, num_layers=2, layers=Layer(mixer=Attention(num_heads=4, num_kv_heads=2))
)
NAMES = ("parameters", "gradients", "optimizer_states")


def counted(strategy, part, folder):
    report = MemoryReport(refuse=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu",
        devices=distributed.get_world_size(),
        strategy=strategy,
        max_steps=1,
        use_distributed_sampler=False,
        callbacks=[report],
        default_root_dir=folder,
        **quiet,
    )
    ids = torch.randint(CONFIG.vocab_size, (2, 9))
    loader = DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)
    trainer.fit(PretrainModule(CONFIG, optimizer=part), loader)
    return [getattr(report.measured, name) for name in NAMES]


@pytest.mark.parametrize(
    ("strategy", "part", "layout"),
    [
        (ShardedOptimizerStrategy(stage=1), AdamW(), Layout(data=2, zero_stage=1)),
        (ShardedOptimizerStrategy(stage=2), Muon(), Layout(data=2, zero_stage=2)),
        (ShardedModelStrategy(), Muon(), Layout(data=2, zero_stage=3)),
        (ShardedModelStrategy(2), AdamW(), Layout(tensor=2, zero_stage=3)),
    ],
)
def test_sizes_are_those_of_the_ranks(ranks, strategy, part, layout, tmp_path):
    with torch.device("meta"):
        module = PretrainModule(CONFIG, optimizer=part)
        module.configure_model()
    optimizer = module.build_optimizer()
    found = ranks(2).run(counted, strategy, part, tmp_path)
    told = [list(local_states(module, optimizer, layout, rank=rank)) for rank in (0, 1)]
    assert told[0] == found[0]
    assert layout.tensor > 1 or told[1] == found[1]
    fullest = local_states(module, optimizer, layout)
    assert sum(fullest) == max(map(sum, told))

"""Layers that are frozen, unfrozen and given to the optimizer while a run goes on, as one process does it."""

import functools

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.utils.data import DataLoader

from lightning_lm.strategies import DataParallelStrategy, ShardedOptimizerStrategy, TensorParallelStrategy

STRATEGIES = {
    "zero1": functools.partial(ShardedOptimizerStrategy, 1, min_split_elements=20),
    "zero2": functools.partial(ShardedOptimizerStrategy, 2, min_split_elements=20),
    "data_parallel": DataParallelStrategy,
    "fsdp2": functools.partial(TensorParallelStrategy, 1),
}
ROWS, WIDTH, BATCHES = 8, 6, 4


class Layers(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([param for param in self.parameters() if param.requires_grad], lr=0.1, momentum=0.9)

    def configure_model(self):
        """Nothing: FSDP2 asks for it."""


class Thaw(BaseFinetuning):
    """Two layers are frozen at first; one is added in the second epoch, and the last one frozen in the third."""

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.net[0], pl_module.net[1]])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.make_trainable(pl_module.net[0])
            optimizer.add_param_group({"params": list(pl_module.net[0].parameters()), "lr": 0.05})
        if epoch == 2:
            self.freeze(pl_module.net[2])


def rows(rank, ranks):
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(BATCHES, ROWS, WIDTH, generator=generator)
    return DataLoader(list(whole.chunk(ranks, dim=1)[rank]), batch_size=None)


def train(name=None, accumulate=1):
    strategy = "auto" if name is None else STRATEGIES[name]()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1 if name is None else torch.distributed.get_world_size(),
        callbacks=[Thaw()],
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **quiet,
    )
    module = Layers()
    trainer.fit(module, rows(trainer.global_rank, trainer.world_size))
    weights = module.state_dict()
    return {key: getattr(value, "full_tensor", lambda value=value: value)().clone() for key, value in weights.items()}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", STRATEGIES)
def test_layers_unfrozen_while_training(ranks, name, accumulate):
    wanted, before = train(accumulate=accumulate), Layers().state_dict()
    assert not torch.equal(wanted["net.0.weight"], before["net.0.weight"])
    assert torch.equal(wanted["net.1.weight"], before["net.1.weight"])
    for found in ranks(2).run(train, name, accumulate):
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)

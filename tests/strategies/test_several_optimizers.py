"""Several optimizers of one module may have parameters in common, and are logged under their own names."""

import copy
import pickle
from collections import defaultdict
from unittest import mock

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from optimizer_runs import make_trainer, weights_of
from torch import nn
from torch.utils.data import DataLoader
from workers import WorkerError

from lightning_lm.optim import MuonOptimizer
from lightning_lm.strategies import ShardedOptimizer, ShardedOptimizerStrategy

BATCHES = torch.linspace(-1, 1, 4 * 2 * 3 * 8).sin().view(4, 2, 3, 8)
"""For four steps and two ranks."""
SPLIT = 100


class InTurns(LightningModule):
    """One optimizer trains the first two layers, the other the last two; each step takes both."""

    def __init__(self, second=torch.optim.AdamW, shard=None):
        super().__init__()
        torch.manual_seed(5)
        self.automatic_optimization = False
        self.second, self.shard = second, shard
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 20), nn.Linear(20, 4))

    def groups(self, layers):
        return [{"params": [param for param in layers.parameters() if param.dim() == 2], **(self.shard or {})}]

    def configure_optimizers(self):
        first = torch.optim.SGD(self.groups(self.layers[:2]), lr=0.05, momentum=0.9)
        return first, self.second(self.groups(self.layers[1:]), lr=0.05)

    def losses(self, rows):
        yield self.layers(rows).square().mean()
        yield (self.layers(rows) - 1).abs().mean()

    def training_step(self, rows, index):
        for optimizer, loss in zip(self.optimizers(), self.losses(rows), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.1)
            optimizer.step()


def in_one_process():
    module = InTurns()
    optimizers = module.configure_optimizers()
    for pair in BATCHES:
        for index, optimizer in enumerate(optimizers):
            optimizer.zero_grad()
            sum(list(module.losses(rows))[index] / 2 for rows in pair).backward()
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)
            optimizer.step()
    return weights_of(module)


def sharded(stage, folder, second=torch.optim.AdamW, shard=None):
    module, monitor = InTurns(second, shard), LearningRateMonitor()
    strategy = ShardedOptimizerStrategy(stage=stage, min_split_elements=SPLIT)
    trainer = make_trainer(strategy, callbacks=[monitor], logger=CSVLogger(folder), log_every_n_steps=1)
    trainer.fit(module, DataLoader(list(BATCHES[:, trainer.global_rank]), batch_size=None))
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    elements = sum(value.numel() for state in states for value in state.values())
    return weights_of(module), sorted(monitor.lrs), elements


@pytest.mark.parametrize("stage", [1, 2])
def test_optimizers_with_common_parameters(ranks, stage, tmp_path):
    wanted = in_one_process()
    found = ranks(2).run(sharded, stage, tmp_path)
    for weights, names, _ in found:
        assert names == ["lr-AdamW", "lr-SGD"]
        for name, value in wanted.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    held = [elements for _, _, elements in found]
    assert max(held) < 0.7 * sum(held)


def test_a_common_parameter_that_one_optimizer_needs_whole(ranks, tmp_path):
    """Muon multiplies whole matrices, SGD would split the same one by rows."""
    with pytest.raises(WorkerError, match=r"shape \(20, 6\).*\"shard\": \"whole\""):
        ranks(2).run(sharded, 2, tmp_path, MuonOptimizer)
    weights = [found[0] for found in ranks(2).run(sharded, 2, tmp_path, MuonOptimizer, {"shard": "whole"})]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class TwoOfAKind(InTurns):
    def __init__(self, num_schedules):
        super().__init__()
        self.num_schedules = num_schedules

    def configure_optimizers(self):
        optimizers = [torch.optim.Adam(self.groups(part), lr=0.05) for part in (self.layers[:2], self.layers[1:])]
        return optimizers, [torch.optim.lr_scheduler.StepLR(one, 1) for one in optimizers[: self.num_schedules]]


def named(folder, num_schedules):
    monitor = LearningRateMonitor("step")
    settings = {"callbacks": [monitor], "logger": CSVLogger(folder), "log_every_n_steps": 1}
    trainer = make_trainer(ShardedOptimizerStrategy(stage=2), **settings)
    trainer.fit(TwoOfAKind(num_schedules), DataLoader(list(BATCHES[:, 0]), batch_size=None))
    return {name: len(rates) for name, rates in monitor.lrs.items()}


@pytest.mark.parametrize("num_schedules", [0, 2])
def test_two_of_a_kind_are_numbered_and_logged_once_a_step(ranks, tmp_path, num_schedules):
    (found,) = ranks(1).run(named, tmp_path, num_schedules)
    assert found == {"lr-Adam": len(BATCHES), "lr-Adam-1": len(BATCHES)}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_goes_on_by_itself(copied):
    """As callbacks that are copied with their trainer have it."""
    param = nn.Parameter(torch.ones(3))
    optimizer = ShardedOptimizer(torch.optim.SGD([param], lr=1.0, momentum=0.5))
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer == mock.ANY == optimizer.inner == optimizer
    other = copied(optimizer)
    (copy_of_param,) = other.param_groups[0]["params"]
    copy_of_param.grad = torch.ones(3)
    other.step()
    assert torch.equal(param.detach(), torch.zeros(3))
    assert torch.equal(copy_of_param.detach(), torch.full((3,), -1.5))  # momentum: 0.5 + 1


def assigned():
    torch.manual_seed(0)
    layers = [nn.Linear(20, 30), nn.Linear(30, 4)]
    params = [param for layer in layers for param in layer.parameters()]
    optimizer = ShardedOptimizer(torch.optim.SGD(layers[0].parameters(), lr=1, momentum=0.9), min_split_elements=SPLIT)
    settings = optimizer.param_groups[0]
    optimizer.param_groups = [{**settings, "lr": 0.25}, {**settings, "lr": 0.5, "params": [*layers[1].parameters()]}]
    optimizer.state = defaultdict(dict)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    moved = [(old - param.detach()).mean().item() for param, old in zip(params, before, strict=True)]
    return moved, sum(value.numel() for state in optimizer.state.values() for value in state.values())


def test_groups_and_states_may_be_assigned(ranks):
    """As `BaseFinetuning` does when it resumes, with layers that were not trained at first."""
    found = ranks(2).run(assigned)
    assert [moved for moved, _ in found] == [pytest.approx([0.25, 0.25, 0.5, 0.5], rel=1e-5)] * 2
    assert sum(held for _, held in found) == 20 * 30 + 30 + 30 * 4 + 4

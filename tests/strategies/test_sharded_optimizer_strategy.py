"""A sharded run ends where one process ends that trains on the same windows."""

import csv

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from optimizer_runs import OPTIMIZERS, SPLIT, Run, fit, in_a_loop, make_trainer, weights_of
from torch.utils.data import DataLoader

from lightning_lm.errors import ConfigurationError
from lightning_lm.strategies import ShardedOptimizerStrategy

TOLERANCE = 1e-8
"""Of the sum of absolute weights after ten steps in float32: rounding, in the order in which ranks add up."""


def sharded(run, stage, folder, precision="32-true", **settings):
    strategy = ShardedOptimizerStrategy(stage=stage, min_split_elements=SPLIT, **settings)
    return fit(run, strategy, folder, precision=precision)


def apart(found, wanted) -> float:
    sums = [sum(value.double().abs().sum().item() for value in weights.values()) for weights in (found, wanted)]
    assert found.keys() == wanted.keys()
    return abs(sums[0] - sums[1]) / sums[1]


def distance(found, wanted) -> float:
    square = sum((found[name].double() - wanted[name].double()).square().sum() for name in wanted)
    return (square / sum(value.double().square().sum() for value in wanted.values())).sqrt().item()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("accumulate", "partial"), [(1, 0), (4, 0), (4, 2)])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_equal_to_one_process(ranks, tmp_path, optimizer, stage, accumulate, partial, clip):
    # Float64 for Muon: with float32 weights it multiplies in bfloat16 where the CPU has that, and one bit grows.
    run = Run(optimizer, clip=clip, accumulate=accumulate, partial=partial, double=optimizer == "muon")
    wanted = in_a_loop(run)
    found = ranks(2).run(sharded, run, stage, tmp_path)
    assert all(torch.equal(found[0][name], found[1][name]) for name in wanted)
    assert apart(found[0], wanted) < TOLERANCE
    assert distance(found[0], wanted) < 1e-7


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_three_ranks_with_uneven_rows(ranks, tmp_path, optimizer, stage):
    """97 rows of the embedding: 33, 33 and 31."""
    run = Run(optimizer, clip=0.05, accumulate=2, double=True)
    wanted = in_a_loop(run)
    for found in ranks(3).run(sharded, run, stage, tmp_path):
        assert distance(found, wanted) < TOLERANCE


def test_gradients_may_be_averaged_at_every_micro_batch(ranks, tmp_path):
    run = Run("adamw", clip=0.05, accumulate=4, partial=2)
    wanted = in_a_loop(run)
    found = ranks(2).run(sharded, run, 2, tmp_path, reduce_every_micro_batch=True)
    assert distance(found[0], wanted) < 1e-7


@pytest.mark.parametrize("stage", [1, 2])
def test_one_rank(ranks, tmp_path, stage):
    run = Run("adamw", clip=0.05, accumulate=2)
    assert distance(ranks(1).run(sharded, run, stage, tmp_path)[0], in_a_loop(run)) < 1e-7


class Branches(LightningModule):
    """One layer that all ranks use, one that only the first uses, one that nobody uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def loss(self, rows, rank):
        used = self.layers[:2] if rank == 0 else self.layers[:1]
        return sum(layer(rows).square().mean() for layer in used)

    def training_step(self, batch, batch_idx):
        return self.loss(batch, self.global_rank)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)


BATCHES = torch.linspace(-1, 1, 3 * 2 * 8).view(3, 2, 2, 4)
"""For three steps and two ranks."""


def use_some(stage):
    module = Branches()
    trainer = make_trainer(ShardedOptimizerStrategy(stage=stage, find_unused_parameters=True))
    trainer.fit(module, DataLoader(list(BATCHES[:, trainer.global_rank]), batch_size=None))
    return weights_of(module.layers)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_no_rank_uses_is_left_alone(ranks, stage):
    alone = Branches()
    before = weights_of(alone.layers[2])
    optimizer = alone.configure_optimizers()
    for rows in BATCHES:
        optimizer.zero_grad()
        (sum(alone.loss(rows[rank], rank) for rank in range(2)) / 2).backward()
        optimizer.step()
    for found in ranks(2).run(use_some, stage):
        for name, weight in weights_of(alone.layers).items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(found[f"2.{name}"], weight) for name, weight in before.items())  # not even decayed


@pytest.mark.parametrize("stage", [1, 2])
def test_half_precision_with_a_fused_optimizer_and_clipping(ranks, tmp_path, stage):
    """The three together stock Lightning refuses; the oracle has no fused optimizer."""
    run, alone = (Run(name, clip=0.05, accumulate=2) for name in ("fused", "adamw"))
    wanted = fit(alone, "auto", tmp_path, precision="bf16-mixed")
    found = ranks(2).run(sharded, run, stage, tmp_path, precision="bf16-mixed")
    assert all(torch.equal(found[0][name], found[1][name]) for name in wanted)
    assert 0 < distance(wanted, in_a_loop(alone)) < 1e-2  # it was bfloat16
    assert distance(found[0], wanted) < 1e-3


def scaled(strategy, folder):
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**18))
    weights = fit(Run("adamw", clip=0.05), strategy, folder, plugins=[plugin])
    return weights, plugin.scaler.get_scale()


def test_a_scaler_of_gradients_with_the_first_stage(ranks, tmp_path):
    (wanted, scale), _ = ranks(2).run(scaled, "ddp", tmp_path)
    assert scale < 2.0**18  # the first steps did overflow, and were left out on every rank
    for found, found_scale in ranks(2).run(scaled, ShardedOptimizerStrategy(min_split_elements=SPLIT), tmp_path):
        assert found_scale == scale
        assert distance(found, wanted) < 1e-7


def refused(folder):
    with pytest.raises(ConfigurationError) as caught:
        scaled(ShardedOptimizerStrategy(stage=2), folder)
    return str(caught.value)


def test_a_scaler_is_refused_with_the_second_stage(ranks, tmp_path):
    for said in ranks(2).run(refused, tmp_path):
        assert "stage=2 shards them" in said
        assert 'Use precision="bf16-mixed", or stage=1.' in said


def monitored(strategy, folder):
    logger = CSVLogger(folder, name="", version="")
    fit(Run("adamw"), strategy, folder, callbacks=[LearningRateMonitor("step")], logger=logger, log_every_n_steps=1)


@pytest.mark.parametrize("stage", [1, 2])
def test_schedules_and_their_monitor_see_the_optimizer_of_the_module(ranks, tmp_path, stage):
    ranks(2).run(monitored, ShardedOptimizerStrategy(stage=stage, min_split_elements=SPLIT), tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        rates = [float(row["lr-AdamW"]) for row in csv.DictReader(file) if row["lr-AdamW"]]
    assert rates == pytest.approx([1e-3 / (1 + 0.1 * step) for step in range(10)])

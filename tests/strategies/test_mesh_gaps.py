"""What Lightning's own ModelParallelStrategy leaves to the user, or gets wrong, and ours does not.

Each test shows stock Lightning failing first; where a later Lightning has repaired it, the test says so and is skipped.
"""

import inspect
import pathlib
import pickle
from enum import Enum
from typing import ClassVar

import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.consolidate_checkpoint import _format_checkpoint
from split_runs import model_config, run, trainer_for
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_lm._lightning import set_mesh_sizes
from lightning_lm.errors import ConfigurationError
from lightning_lm.strategies import ShardedModelStrategy, TensorParallelStrategy
from lightning_lm.strategies.checkpoints.atomic import consolidate
from lightning_lm.strategies.tensor_parallel.shard import check_model

TP2 = {"tensor_parallel_size": 2}


class Mixer(LightningModule):
    """Any user's module: two matrices around a norm, split by itself under stock Lightning."""

    parallel_plan: ClassVar = {"body": "gather", "body.up": "colwise", "body.down": "rowwise", "norm": "norm"}

    def __init__(self, *, splits=False, shards=False, fused=False):
        super().__init__()
        self.splits, self.shards, self.fused = splits, shards, fused
        self.body = Body()
        self.norm = nn.LayerNorm(8)
        self.is_done = False

    def configure_model(self):
        if self.is_done:
            return
        self.is_done = True
        if self.splits and self.device_mesh["tensor_parallel"].size() > 1:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(self.body, self.device_mesh["tensor_parallel"], plan)
        if self.shards:
            for part in (self.body, self.norm):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        self.log("tokens", float(batch.numel()), sync_dist=True, reduce_fx="sum", on_step=False, on_epoch=True)
        return self.norm(self.body(batch)).square().mul(torch.arange(8.0)).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step_loss(batch), sync_dist=True)

    def training_step_loss(self, batch):
        return self.norm(self.body(batch)).square().mul(torch.arange(8.0)).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, fused=self.fused)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Batches:
    """Each data-parallel rank reads its half of the same four rows."""

    def __init__(self, trainer, count=2):
        self.trainer, self.count = trainer, count

    def __len__(self):
        return self.count

    def __iter__(self):
        share = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        for number in range(self.count):
            rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
            yield rows.chunk(share["num_replicas"])[share["rank"]]


def train(strategy, make=Mixer, *, batches=2, **options):
    torch.manual_seed(1)
    module = make()
    trainer = trainer_for(strategy, **{"max_epochs": 1, **options})
    trainer.fit(module, Batches(trainer, batches))
    weights = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in module.state_dict().items()}
    return weights, {name: float(value) for name, value in trainer.callback_metrics.items()}


def stock(data, tensor):
    return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)


FAILURES = RuntimeError, ValueError, TypeError, KeyError, AssertionError, pickle.UnpicklingError


def fails_then_works(broken, message, works):
    """Return what ours gives, after stock Lightning has failed as it is known to; nothing where it no longer does."""
    said = None
    try:
        broken()
    except FAILURES as error:
        said = str(error)
    assert said is None or message in said
    return None if said is None else works()


def repaired_or(found):
    if None in found:
        pytest.skip("this Lightning does it too")
    return found


def assert_same_weights(found, expected):
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5)


def fused():
    return fails_then_works(
        lambda: train(stock(1, 2), lambda: Mixer(splits=True, fused=True)),
        "mixed torch.Tensor and DTensor",
        lambda: train(TensorParallelStrategy(2), lambda: Mixer(fused=True))[0],
    )


def test_fused_optimizers(ranks):
    found = repaired_or(ranks(2).run(fused))
    assert_same_weights(found[0], train("auto", lambda: Mixer(fused=True))[0])


def clipped(data, tensor, message):
    return fails_then_works(
        lambda: train(stock(data, tensor), lambda: Mixer(splits=True, shards=data > 1), gradient_clip_val=0.01),
        message,
        lambda: train(TensorParallelStrategy(tensor), gradient_clip_val=0.01)[0],
    )


@pytest.mark.parametrize(("data", "message"), [(1, "mixed torch.Tensor and DTensor"), (2, "must have the same mesh")])
def test_clipping_on_every_mesh(ranks, data, message):
    found = repaired_or(ranks(2 * data).run(clipped, data, 2, message))
    assert_same_weights(found[0], train("auto", gradient_clip_val=0.01)[0])


def forgotten():
    apart = train(stock(2, 1), Mixer)[0]
    together = train(TensorParallelStrategy(1), Mixer)[0]
    return apart["body.up.weight"], together["body.up.weight"]


def test_replicas_never_drift_apart(ranks):
    (apart, together), (other_apart, other_together) = ranks(2).run(forgotten)
    if torch.equal(apart, other_apart):
        pytest.skip("this Lightning keeps replicas equal")
    assert torch.equal(together, other_together)
    torch.testing.assert_close(together, train("auto", Mixer)[0]["body.up.weight"], rtol=0, atol=2e-5)


class HalfSharded(Mixer):
    def configure_model(self):
        fully_shard(self.body, mesh=self.device_mesh["data_parallel"])


def half_sharded():
    with pytest.raises(ConfigurationError, match=r"norm\.weight.*train apart"):
        train(TensorParallelStrategy(1), HalfSharded)


def test_a_model_that_its_user_shards_in_part_is_refused(ranks):
    ranks(2).run(half_sharded)


def test_a_model_that_its_user_has_parallelised_is_left_as_it_is(ranks):
    (found, _), *_ = ranks(4).run(parallelised_by_its_user)
    assert_same_weights(found, train("auto", Mixer, gradient_clip_val=0.01)[0])


def parallelised_by_its_user():
    return train(TensorParallelStrategy(2), lambda: Mixer(splits=True, shards=True), gradient_clip_val=0.01)


def reductions(strategy):
    torch.manual_seed(1)
    trainer = trainer_for(strategy, accumulate_grad_batches=4, max_epochs=1)
    with torch.profiler.profile() as profile:
        trainer.fit(Mixer(shards=type(strategy) is ModelParallelStrategy), Batches(trainer, 4))
    return sum(event.count for event in profile.key_averages() if event.key.startswith("FSDP::post_backward_reduce"))


def both_reductions():
    return reductions(stock(2, 1)), reductions(TensorParallelStrategy(1))


def test_one_reduction_a_window(ranks):
    theirs, ours = ranks(2).run(both_reductions)[0]
    assert ours == 2  # units
    if theirs == ours:
        pytest.skip("this Lightning reduces once a window")
    assert theirs == 4 * ours


def logged():
    return train(stock(1, 2), lambda: Mixer(splits=True))[1]["tokens"], train(TensorParallelStrategy(2))[1]["tokens"]


def test_sums_count_each_row_once(ranks):
    for theirs, ours in ranks(2).run(logged):
        assert ours == 2 * 4 * 8
        if theirs != ours:
            assert theirs == 2 * ours


def stops_early():
    trainer = trainer_for(
        TensorParallelStrategy(2), max_epochs=5, callbacks=[EarlyStopping("val_loss", patience=0, min_delta=100.0)]
    )
    trainer.fit(Mixer(), Batches(trainer), Batches(trainer))
    return trainer.current_epoch


def test_ranks_agree_to_stop(ranks):
    assert ranks(2).run(stops_early) == [2, 2]


def evaluation_modes(strategy):
    module = Mixer(shards=type(strategy) is ModelParallelStrategy)
    trainer = trainer_for(strategy, max_epochs=1, inference_mode=True)
    trainer.validate(module, Batches(trainer), verbose=False)
    loop = trainer.validate_loop.inference_mode, trainer.fit_loop.epoch_loop.val_loop.inference_mode
    trainer.fit(module, Batches(trainer))
    return loop


def both_evaluation_modes():
    return evaluation_modes(stock(2, 1)), evaluation_modes(TensorParallelStrategy(1))


def test_validate_then_fit_makes_nothing_for_inference_only(ranks):
    """Over gloo Lightning never enters inference mode, so here the switch is looked at that decides it over NCCL."""
    theirs, ours = ranks(2).run(both_evaluation_modes)[0]
    assert ours == (False, False)
    if theirs == ours:
        pytest.skip("this Lightning never evaluates for inference only under this strategy")
    assert theirs[0]


class Colour(Enum):
    RED = "red"


class WithPath(Mixer):
    def __init__(self, where, colour, **options):
        super().__init__(**options)
        self.save_hyperparameters("where", "colour")


def resumed(strategy, folder, **options):
    """Train a step, save, and go on for another."""
    module = WithPath(pathlib.Path("data"), Colour.RED, **options)
    trainer = trainer_for(strategy(), max_steps=1)
    trainer.fit(module, Batches(trainer))
    trainer.save_checkpoint(folder)
    module, again = WithPath(pathlib.Path("data"), Colour.RED, **options), trainer_for(strategy(), max_steps=2)
    again.fit(module, Batches(again), ckpt_path=folder, weights_only=False)
    return again.global_step


def hyper_parameters(folder):
    return fails_then_works(
        lambda: resumed(lambda: stock(1, 2), folder / "theirs", splits=True),
        "weights_only",
        lambda: resumed(lambda: TensorParallelStrategy(2), folder / "ours"),
    )


def test_hyper_parameters_do_not_make_a_checkpoint_useless(ranks, tmp_path):
    assert repaired_or(ranks(2).run(hyper_parameters, tmp_path)) == [2, 2]


def alone(folder):
    def broken():
        module = Mixer(splits=True)
        trainer = trainer_for(stock(1, 1), max_steps=1)
        trainer.fit(module, Batches(trainer))
        trainer.save_checkpoint(folder / "theirs")
        trainer_for(stock(1, 1), max_steps=2).fit(Mixer(splits=True), Batches(trainer), ckpt_path=folder / "theirs")

    return fails_then_works(
        broken,
        "Could not find a distributed model",
        lambda: resumed(lambda: TensorParallelStrategy(1), folder / "ours"),
    )


def test_one_device_goes_on_too(ranks, tmp_path):
    assert repaired_or(ranks(1).run(alone, tmp_path)) == [2]


class NoHook(LightningModule):
    parallel_plan = Mixer.parallel_plan
    training_step, configure_optimizers = Mixer.training_step, Mixer.configure_optimizers
    fused = False

    def __init__(self):
        super().__init__()
        self.body, self.norm = Body(), nn.LayerNorm(8)


def without_a_hook():
    return fails_then_works(
        lambda: train(stock(1, 2), NoHook),
        "you are required to override the `configure_model()`",
        lambda: train(TensorParallelStrategy(2), NoHook)[0],
    )


def test_any_module_and_a_short_name(ranks):
    found = repaired_or(ranks(2).run(without_a_hook))
    assert_same_weights(found[0], train("auto", NoHook)[0])
    assert "model_parallel" not in StrategyRegistry
    for name, size in (("tensor_parallel", "auto"), ("fsdp2", 1)):
        strategy = trainer_for(name).strategy
        assert isinstance(strategy, ShardedModelStrategy)
        assert strategy.tensor_parallel_size == size


def test_a_gradient_scaler_is_refused():
    with pytest.raises(ConfigurationError, match="bf16-mixed"):
        check_model(Mixer(), Scaled())


class Scaled:
    scaler = torch.amp.GradScaler("cpu")


def test_bfloat16_with_a_fused_optimizer_and_clipping(ranks):
    """Stock Lightning refuses the three together under every strategy."""
    exact = run(config=model_config(), double=False, gradient_clip_val=0.5)[0]
    found = ranks(2).run(in_bfloat16)[0]
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-2)


def in_bfloat16():
    options = {"precision": "bf16-mixed", "gradient_clip_val": 0.5, "double": False}
    train(TensorParallelStrategy(2), lambda: Mixer(fused=True), precision="bf16-mixed", gradient_clip_val=0.5)
    return run(TensorParallelStrategy(2, sequence_parallel=True), config=model_config(), **options)[0]


def test_the_private_names_of_lightning_are_still_there():
    """`_lightning.set_mesh_sizes` sets them; if one was renamed, look at `ModelParallelStrategy.setup_environment`."""
    strategy = ModelParallelStrategy()
    before = set(vars(strategy))
    set_mesh_sizes(strategy, data_parallel=2, tensor_parallel=1)
    assert set(vars(strategy)) == before
    source = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert "self._data_parallel_size" in source
    assert "self._tensor_parallel_size" in source


def sharded_folders(folder):
    for name, strategy, options in (("theirs", stock(1, 2), {"splits": True}), ("ours", TensorParallelStrategy(2), {})):
        trainer = trainer_for(strategy, max_steps=1)
        trainer.fit(Mixer(**options), Batches(trainer))
        trainer.save_checkpoint(folder / name)


def stock_failure(folder):
    try:
        _format_checkpoint(_load_distributed_checkpoint(folder))
    except KeyError as error:
        return error
    return None


def test_a_folder_becomes_a_plain_checkpoint(ranks, tmp_path):
    ranks(2).run(sharded_folders, tmp_path)
    consolidate(tmp_path / "ours", tmp_path / "whole.ckpt")
    assert Mixer.load_from_checkpoint(tmp_path / "whole.ckpt").body.up.weight.shape == (16, 8)
    failure = stock_failure(tmp_path / "theirs")
    if failure is None:
        pytest.skip("this Lightning consolidates too")
    assert failure.args == ("model",)

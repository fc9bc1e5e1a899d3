"""Recorded metrics are sums over counts, wherever micro-batches, ranks and restarts cut them."""

import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_lm.modules import PretrainModule, RunningMetrics
from lightning_lm.optim import Constant

CPU = torch.device("cpu")


@pytest.fixture
def strategy():
    return SingleDeviceStrategy(CPU)


class Recording(PretrainModule):
    """Records what can be computed from the rows alone."""

    folder = None

    def training_loss(self, batch):
        self.measure(batch)
        return super().training_loss(batch)

    def evaluate_batch(self, batch):
        self.measure(batch)
        return super().evaluate_batch(batch)

    def measure(self, batch):
        kept = batch["labels"] >= 0
        self.record("label", batch["labels"][kept].sum(), kept.sum())
        self.record_max("largest", batch["input_ids"].max())
        self.record_min("smallest", batch["input_ids"].min())
        self.record_total("rows", len(kept))
        if self.global_rank == 1:
            self.record("seen_by_one", 3.0, 2)

    def on_train_end(self):
        if self.folder is not None:
            torch.save(self.last_metrics, self.folder / f"{self.global_rank}.pt")


def expected(rows):
    kept = rows["labels"] >= 0
    return {
        "train/label": rows["labels"][kept].double().mean().item(),
        "train/largest": float(rows["input_ids"].max()),
        "train/smallest": float(rows["input_ids"].min()),
        "train/rows": float(len(kept)),
    }


def chosen(metrics, wanted):
    return {name: metrics[name] for name in wanted}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_mean_is_a_sum_over_a_count_whatever_the_micro_batches(config, rows, loader, make_trainer, accumulate):
    data = rows(16, empty=True)
    module = Recording(config)
    trainer = make_trainer(max_steps=1, accumulate_grad_batches=accumulate, log_every_n_steps=1)
    trainer.fit(module, loader(data, 16 // accumulate))
    wanted = expected(data)
    assert chosen(module.last_metrics, wanted) == pytest.approx(wanted, rel=1e-12)
    assert trainer.callback_metrics["train/label"].item() == pytest.approx(wanted["train/label"])


def test_ranks_add_up_though_one_has_met_fewer_names(config, rows, loader, make_trainer, tmp_path):
    data = rows(16, empty=True)
    trainer = make_trainer(
        max_steps=1,
        devices=2,
        log_every_n_steps=1,
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"),
    )
    module = Recording(config)
    module.folder = tmp_path

    class Shares:
        def __len__(self):
            return 1

        def __iter__(self):
            return iter(loader(data, 8, rank=trainer.global_rank, ranks=2))

    trainer.fit(module, Shares())
    wanted = expected(data) | {"train/seen_by_one": 1.5}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert chosen(found, wanted) == pytest.approx(wanted, rel=1e-12)


def test_a_restart_between_two_logs_changes_no_number(config, row_data, make_trainer, tmp_path):
    def fit(steps, name, checkpoint=None):
        torch.manual_seed(0)
        module = Recording(config, schedule=Constant())
        logger = CSVLogger(tmp_path, name=name)
        trainer = make_trainer(max_steps=steps, log_every_n_steps=4, logger=logger, max_epochs=-1)
        trainer.fit(module, datamodule=row_data(), ckpt_path=checkpoint)
        return trainer, module

    _, whole = fit(8, "whole")
    half, _ = fit(6, "half")
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(8, "resumed", tmp_path / "half.ckpt")
    assert resumed.last_metrics == whole.last_metrics
    assert whole.last_metrics["train/rows"] == 8 * 4


def test_evaluation_has_its_own_sums(config, row_data, make_trainer):
    data, module = row_data(), Recording(config)
    trainer = make_trainer(
        max_steps=2, log_every_n_steps=1, val_check_interval=1, check_val_every_n_epoch=None, num_sanity_val_steps=2
    )
    trainer.fit(module, datamodule=data)
    wanted = {name.replace("train", "val"): value for name, value in expected(data.validation_rows).items()}
    assert chosen(module.last_metrics, wanted) == pytest.approx(wanted, rel=1e-12)
    assert module.last_metrics["train/rows"] == 2 * 4
    assert trainer.callback_metrics["val/label"].item() == pytest.approx(wanted["val/label"])


def test_a_name_without_items_is_left_out(strategy):
    metrics = RunningMetrics()
    metrics.add("mean", "nothing", 0.0, 0, device=CPU)
    metrics.add("mean", "something", 1.0, 4, device=CPU)
    assert metrics.read(strategy) == {"something": 0.25}
    assert metrics.read(strategy) == {}


def test_totals_stay_and_the_rest_begins_anew(strategy):
    metrics = RunningMetrics()
    for value in (1, 2):
        metrics.add("total", "total", value, device=CPU)
        metrics.add("max", "max", -value, device=CPU)
        metrics.add("min", "min", -value, device=CPU)
        assert metrics.read(strategy) == {"total": sum(range(value + 1)), "max": -value, "min": -value}


def test_sums_lose_no_small_part_beside_a_large_one(strategy):
    """In float32 the ones would vanish."""
    metrics = RunningMetrics()
    for value in (1e9, *[1.0] * 100):
        metrics.add("mean", "x", torch.tensor(value, dtype=torch.float32), device=CPU)
    assert metrics.read(strategy)["x"] == math.fsum([1e9, *[1.0] * 100]) / 101


def test_what_was_recorded_under_inference_mode_can_be_added_to_outside(strategy):
    metrics = RunningMetrics()
    with torch.inference_mode():
        metrics.add("mean", "x", torch.ones(()), device=CPU)
    metrics.add("mean", "x", torch.ones((), requires_grad=True), device=CPU)
    assert metrics.read(strategy) == {"x": 1.0}

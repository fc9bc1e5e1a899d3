"""Throughput against a clock that only training and validation move."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_lm.callbacks import Throughput
from lightning_lm.callbacks.flops import peak_flops_per_s, training_flops_per_token
from lightning_lm.callbacks.hooks import clocks_stopped

SHAPES = [(2, 9), (4, 9), (1, 5), (3, 17), (2, 9), (2, 3)] * 4


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved; no other module sees it."""
    state = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("lightning_lm.callbacks.throughput.time", SimpleNamespace(perf_counter=lambda: state.now))
    return state


@pytest.fixture
def timed_module(foreign_module, clock):
    class Timed(foreign_module):
        """One second for each row of a batch, an hour for a validation batch."""

        def training_step(self, batch, batch_idx):
            clock.now += len(batch["input_ids"])
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            clock.now += 3600

    return Timed


class Busy(Callback):
    """Samples texts for a day, between steps and behind validations."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with clocks_stopped(trainer):
            self.clock.now += 86400

    def on_validation_end(self, trainer, pl_module):
        self.on_train_batch_end(trainer, pl_module, None, None, 0)


def logged(record, name):
    return {step: metrics[name] for step, metrics in record.metrics if name in metrics}


@pytest.mark.parametrize(("accumulate", "before", "after"), [(1, 0, 0), (2, 0, 1), (2, 1, 0)])
def test_tokens_and_seconds_of_whole_steps(
    accumulate, before, after, timed_module, batches_of, loader_of, trainer_with, record_of, clock
):
    """Variable batches, accumulation, and in between validations and samples that must not count."""
    record, batches = record_of(), batches_of(SHAPES, ignored=0.0)
    trainer = trainer_with(
        *(Busy(clock) for _ in range(before)),
        Throughput(),
        *(Busy(clock) for _ in range(after)),
        logger=record,
        max_epochs=1,
        log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
        val_check_interval=4,
    )
    trainer.fit(timed_module(), loader_of(batches), loader_of(batches[:1]))

    steps = [SHAPES[i : i + accumulate] for i in range(0, len(SHAPES), accumulate)]
    tokens = [sum(rows * (width - 1) for rows, width in step) for step in steps]
    seconds = [sum(rows for rows, _ in step) for step in steps]
    windows = [(1, 3), *((end - 3, end) for end in range(6, len(steps) + 1, 3))]  # the first step is left out
    expected_rate = {end: sum(tokens[begin:end]) / sum(seconds[begin:end]) for begin, end in windows}
    expected_time = {end: sum(seconds[begin:end]) / (end - begin) for begin, end in windows}
    assert logged(record, "perf/tokens_per_s") == pytest.approx(expected_rate)
    assert logged(record, "perf/step_time_s") == pytest.approx(expected_time)
    assert trainer.callback_metrics["perf/tokens_per_s"] == pytest.approx(expected_rate[windows[-1][1]])


def test_mfu_from_given_numbers(timed_module, batches_of, loader_of, trainer_with, record_of):
    record, batches = record_of(), batches_of([(2, 9)] * 6)
    throughput = Throughput(flops_per_token=30.0, peak_flops_per_s=1200.0)
    trainer = trainer_with(throughput, logger=record, max_epochs=1, log_every_n_steps=2)
    trainer.fit(timed_module(), loader_of(batches))
    # 16 tokens take 2 s: 8 tokens/s of 30 FLOPs are a fifth of the peak.
    assert logged(record, "perf/mfu") == pytest.approx({2: 0.2, 4: 0.2, 6: 0.2})


def test_memory_of_the_process_and_no_mfu_without_a_peak(timed_module, batches_of, loader_of, trainer_with, record_of):
    record = record_of()
    trainer = trainer_with(Throughput(), logger=record, max_epochs=1, log_every_n_steps=2)
    trainer.fit(timed_module(), loader_of(batches_of([(2, 9)] * 4)))
    memory = logged(record, "perf/memory_gb")[4]
    with open("/proc/self/status", encoding="utf-8") as status:
        peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert memory == pytest.approx(peak_kib * 1024 / 1e9, rel=0.1)
    assert not logged(record, "perf/mfu")


def test_flops_of_a_foreign_module_are_counted_without_a_trace(
    timed_module, batches_of, loader_of, trainer_with, record_of
):
    """The module has a dropout: a run that counts must equal one that does not, bit for bit."""
    batches = batches_of([(2, 9)] * 4)
    weights, records = [], []
    for throughput in (Throughput(), Throughput(peak_flops_per_s=1200.0)):
        records.append(record_of())
        module = timed_module()
        torch.manual_seed(3)
        trainer_with(throughput, logger=records[-1], max_epochs=1, log_every_n_steps=2).fit(module, loader_of(batches))
        weights.append(module.head.weight)
    assert torch.equal(*weights)
    flops = 6 * 8 * 256  # of the head: a multiplication and an addition, thrice
    assert logged(records[1], "perf/mfu") == pytest.approx({2: 8 * flops / 1200, 4: 8 * flops / 1200})


def test_attention_of_a_foreign_module_is_counted(foreign_module):
    class Attends(foreign_module):
        def forward(self, input_ids):
            x = self.embedding(input_ids)
            return self.head(nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True))

    length = 16
    assert training_flops_per_token(Attends(), length) == 3 * (2 * 8 * 256 + 4 * 8 * length)


def no_forward(self, batch):
    raise NotImplementedError


def forward_of_a_batch(self, batch):
    return self.head(self.embedding(batch["input_ids"]))


def forward_of_two(self, input_ids, mask):
    return self.head(self.embedding(input_ids)) * mask


@pytest.mark.parametrize("forward", [no_forward, forward_of_a_batch, forward_of_two])
def test_a_module_that_cannot_be_run_on_ids_is_counted_from_its_weights(forward, foreign_module):
    module = type("Module", (foreign_module,), {"forward": forward})()
    assert training_flops_per_token(module, 16) == 6 * 8 * 256
    assert module.training


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H200", "bf16-mixed", 989.4),
        ("NVIDIA H100 80GB HBM3", "16-true", 989.4),
        ("NVIDIA H100 PCIe", "bf16-true", 756.5),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312.0),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5),
        ("Tesla T4", "16-mixed", 65.0),
        ("NVIDIA A10", "bf16-mixed", 125.0),
    ],
)
def test_dense_peaks_of_data_sheets(name, precision, teraflops, monkeypatch):
    """Values of the vendors' sheets, without sparsity."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert peak_flops_per_s(torch.device("cuda", 0), precision) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 3090 Ti", "NVIDIA RTX A4000", "Some New Chip"])
def test_unknown_chips_have_no_peak(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops_per_s(torch.device("cuda", 0), "bf16-mixed") is None
    assert peak_flops_per_s(torch.device("cpu"), "bf16-mixed") is None


def test_ranks_are_added(timed_module, batches_of, loader_of, trainer_with):
    """Rank 0 trains on 3 rows a step and rank 1 on 1, three seconds each: 4 rows of 8 tokens in 3 s."""
    mine = {0: batches_of([(3, 9)] * 4), 1: batches_of([(1, 9)] * 4)}

    class Module(timed_module):
        def train_dataloader(self):
            return loader_of(mine[self.global_rank])

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            super().training_step({key: value[:1] for key, value in batch.items()}, batch_idx)
            return loss

    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    trainer = trainer_with(Throughput(), max_epochs=1, log_every_n_steps=2, **options)
    trainer.fit(Module())
    assert trainer.callback_metrics["perf/tokens_per_s"] == pytest.approx(32 / 4)
    assert trainer.callback_metrics["perf/tokens_per_s_per_device"] == pytest.approx(16 / 4)

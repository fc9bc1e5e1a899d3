"""Every callback beside ten modules of other people: it trains what it trained without, to the last bit."""

import io
import math

import pytest
import rich
import torch
from foreign_modules import MODULES, VOCAB, loader_of
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_lm.callbacks import (
    EMA,
    CompressionReport,
    GradientNoiseScale,
    KernelSwap,
    LMProgressBar,
    LMSummary,
    LossSpike,
    MemoryReport,
    Perplexity,
    Profile,
    SampleText,
    ScalingLaw,
    Throughput,
)
from lightning_lm.callbacks.flops import training_flops_per_token
from lightning_lm.callbacks.hooks import Attempt
from lightning_lm.errors import ConfigurationError
from lightning_lm.scaling import RunLedger

AUTOMATIC = [name for name in MODULES if name not in ("GAN", "by hand")]


@pytest.fixture
def console(monkeypatch):
    console = Console(file=io.StringIO(), width=200, color_system=None)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    return console


@pytest.fixture
def fit(trainer_with):
    def run(name, *callbacks, steps=6, **options):
        foreign = MODULES[name]
        torch.manual_seed(0)
        module = foreign.make()
        torch.manual_seed(1)
        defaults = {"max_epochs": 1, "log_every_n_steps": 2, "val_check_interval": 3}
        trainer = trainer_with(*callbacks, **(defaults | options))
        trainer.fit(module, loader_of(foreign, steps), loader_of(foreign, 2, seed=1))
        return trainer, module

    return run


OBSERVERS = {
    "CompressionReport": lambda folder, tokenizer: CompressionReport(),
    "LMProgressBar": lambda folder, tokenizer: LMProgressBar(refresh_s=0.0, plain_every_s=0.0),
    "LMSummary": lambda folder, tokenizer: LMSummary(),
    "LMSummary of 8 tokens": lambda folder, tokenizer: LMSummary(context_length=8),
    "LossSpike": lambda folder, tokenizer: LossSpike(),
    "MemoryReport": lambda folder, tokenizer: MemoryReport(),
    "Perplexity": lambda folder, tokenizer: Perplexity(),
    "Profile": lambda folder, tokenizer: Profile(warmup=1, steps=1, folder=folder),
    "SampleText": lambda folder, tokenizer: SampleText(["a"], max_new_tokens=2, tokenizer=tokenizer, every_n_steps=1),
    "ScalingLaw": lambda folder, tokenizer: ScalingLaw(folder / "ledger.jsonl"),
    "Throughput": lambda folder, tokenizer: Throughput(peak_flops_per_s=1e12),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_no_observer_ends_or_changes_a_run(name, fit, tmp_path, tokenizer, console):
    _, plain = fit(name)
    callbacks = [make(tmp_path, tokenizer) for label, make in OBSERVERS.items() if label != "LMSummary of 8 tokens"]
    _, module = fit(name, *callbacks, enable_progress_bar=True)
    assert all(torch.equal(module.state_dict()[key], weight) for key, weight in plain.state_dict().items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_the_average_of_any_module(name, fit):
    trainer, module = fit(name, EMA(0.5))
    ema = trainer.callbacks[0]
    assert ema.average.keys() == dict(module.named_parameters()).keys()
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_what_changes_a_run_works_or_is_refused_before_it(name, fit):
    if name in AUTOMATIC:
        fit(name, GradientNoiseScale(), accumulate_grad_batches=2)
    else:
        with pytest.raises(ConfigurationError, match="GradientNoiseScale"):
            fit(name, GradientNoiseScale())
    if name in ("transformers", "TransformerEncoder"):
        fit(name, KernelSwap())
    else:
        with pytest.raises(ConfigurationError, match="KernelSwap found nothing"):
            fit(name, KernelSwap())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_throughput_counts_tokens_or_says_nothing_of_them(name, fit, record_of):
    trainer, _ = fit(name, Throughput(peak_flops_per_s=1e12), logger=record_of())
    logged = {key for _, metrics in trainer.logger.metrics for key in metrics}
    assert "perf/step_time_s" in logged
    assert ("perf/tokens_per_s" in logged) == ("perf/mfu" in logged) == bool(MODULES[name].tokens)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AUTOMATIC)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_losses_are_those_of_the_steps(name, accumulate, fit, tmp_path, console):
    """Against the returned losses; not divided by accumulation, not the mean of the epoch before."""
    foreign, losses = MODULES[name], []

    class Kept(foreign.make):
        def forward_loss(self, batch):
            loss = super().forward_loss(batch)
            if self.training:
                losses.append(loss.item())
            return loss

    law = ScalingLaw(tmp_path / "ledger.jsonl")
    spikes = LossSpike()
    MODULES["kept"] = foreign._replace(make=Kept)
    try:
        trainer, _ = fit(
            "kept",
            law,
            spikes,
            LMProgressBar(plain_every_s=0.0),
            enable_progress_bar=True,
            accumulate_grad_batches=accumulate,
            log_every_n_steps=1,
            max_epochs=2,
            limit_val_batches=0,
        )
    finally:
        del MODULES["kept"]
    assert trainer.global_step == 12 / accumulate
    means = torch.tensor(losses, dtype=torch.float64).view(-1, accumulate).mean(1).tolist()
    assert list(spikes._losses) == pytest.approx(means, rel=1e-6)
    if foreign.tokens:
        (run,) = RunLedger(tmp_path / "ledger.jsonl").read()
        assert [loss for _, loss in run.curve] == pytest.approx(means, rel=1e-6)
        assert run.loss == pytest.approx(means[-1], rel=1e-6)
        assert run.tokens == 12 * foreign.tokens
    last = [line for line in console.file.getvalue().splitlines() if line.startswith("step")][-1]
    assert f"loss {losses[-1]:.4f}" in last


@pytest.mark.parametrize("name", ["LSTM", "TransformerEncoder", "MultiheadAttention", "pairs", "by hand"])
def test_flops_are_those_of_training(name):
    """Three forward passes as torch counts them in training, where no inference path is taken."""
    module, ids = MODULES[name].make(), torch.zeros(1, 8, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), counter:
        module(ids)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    assert training_flops_per_token(module, 8) == 3 * counter.get_total_flops() / 8
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert module.training


def test_flops_of_fused_layers_by_hand():
    """4 projections and 2 feed-forward matrices a layer, 2 products of attention over 8 keys; 4 gates of an LSTM."""
    head, layer = 2 * 16 * VOCAB, 2 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 2 * 16 * 8
    assert training_flops_per_token(MODULES["TransformerEncoder"].make(), 8) == 3 * (2 * layer + head)
    assert training_flops_per_token(MODULES["LSTM"].make(), 8) == 3 * (2 * 4 * 16 * (16 + 16) + head)


@pytest.mark.parametrize("name", ["perceptron", "convolutions", "GAN", "dictionaries"])
def test_flops_of_what_takes_no_ids_are_not_counted(name, fit, console):
    assert training_flops_per_token(MODULES[name].make(), 8) is None
    fit(name, LMSummary(context_length=8), limit_val_batches=0)
    assert "FLOPs not counted" in console.file.getvalue()


class OfAUser(Exception):  # noqa: N818
    """Directly under Exception, as many are."""


class Raises(MODULES["LSTM"].make):
    error = RuntimeError("not for you")

    def forward(self, ids):
        if len(ids) == 1:
            raise self.error
        return super().forward(ids)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("x"),
        AssertionError(),
        KeyError("x"),
        ZeroDivisionError(),
        MisconfigurationException("x"),
        OSError(),
        OfAUser("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_forward_that_an_observer_cannot_use(error, trainer_with, console, tokenizer):
    module, foreign = Raises(), MODULES["LSTM"]
    module.error = error
    callbacks = [
        LMSummary(8),
        SampleText(["a"], tokenizer=tokenizer, every_n_steps=1),
        Throughput(peak_flops_per_s=1.0),
    ]
    trainer_with(*callbacks, max_epochs=1, log_every_n_steps=1).fit(
        module, loader_of(foreign, 3), loader_of(foreign, 1)
    )
    assert math.isfinite(float(module.out.weight.sum()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), StopIteration(), EOFError()], ids=lambda error: type(error).__name__
)
def test_what_is_no_failure_of_a_forward_goes_on(error):
    with pytest.raises(type(error)), Attempt():
        raise error


@pytest.mark.filterwarnings("ignore")
def test_a_data_module_whose_texts_fail(trainer_with, console, tokenizer):
    """The report at the end and the prompts ask a user's data module; what it raises ends nothing."""
    foreign = MODULES["LSTM"]

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader_of(foreign, 3)

        def validation_texts(self):
            raise OfAUser("no texts today")

    data = Data()
    data.tokenizer = tokenizer
    trainer = trainer_with(CompressionReport(), SampleText(every_n_steps=1), max_epochs=1)
    trainer.fit(foreign.make(), datamodule=data)
    assert trainer.global_step == 3

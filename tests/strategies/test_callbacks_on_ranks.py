"""What callbacks say and do under every strategy is what they say and do on one process."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from split_runs import STRATEGIES, Rows, model_config, run, trainer_for, weights_of
from torch import distributed, nn
from torch.utils.data import DataLoader

from lightning_lm.callbacks import EMA, GradientNoiseScale, KernelSwap, Perplexity, SampleText, ScalingLaw
from lightning_lm.errors import ConfigurationError
from lightning_lm.models import GLU, Attention, Layer
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import SGD, Constant
from lightning_lm.scaling import RunLedger
from lightning_lm.tokenizers import CharacterTokenizer

TOKENIZER = CharacterTokenizer("0123456789=")
SHARED = [name for name in STRATEGIES if name != "one"]


@functools.cache
def alone(function, *args):
    return function("one", *args)


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=tolerance)


# --- the average of weights ---


def averaged(strategy):
    return run(STRATEGIES[strategy](), callbacks=[EMA(0.7)])[2]


@pytest.mark.parametrize("strategy", SHARED)
def test_the_average_of_weights(ranks, strategy):
    for found in ranks(2).run(averaged, strategy):
        assert_same(found, alone(averaged), 1e-8)


# --- evaluation, by the module and by the callback, between steps ---


class Told(PretrainModule):
    """Returns the sums of each batch."""


class Asked(PretrainModule):
    """Returns nothing, so that the callback runs the model once more."""

    def validation_step(self, batch, batch_idx):
        return None


class Foreign(LightningModule):
    """Has logits and no more."""

    def __init__(self, config, **_):
        super().__init__()
        self.embedding, self.head = nn.Embedding(config.vocab_size, 8), nn.Linear(8, config.vocab_size)
        self.last_metrics = {}

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))

    def training_step(self, batch, batch_idx):
        rows = self(batch["input_ids"][:, :-1]).flatten(0, 1)
        return F.cross_entropy(rows, batch["input_ids"][:, 1:].flatten())

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Curve(Perplexity):
    """Keeps what was logged after each validation."""

    def on_validation_epoch_end(self, trainer, pl_module):
        super().on_validation_epoch_end(trainer, pl_module)
        self.seen = [*getattr(self, "seen", []), trainer.logged_metrics.get("val/loss")]


def evaluated(strategy, kind):
    torch.manual_seed(1)
    module = kind(model_config(), optimizer=SGD(lr=0.1), schedule=Constant())
    curve = Curve()
    trainer = trainer_for(
        STRATEGIES[strategy](),
        callbacks=[EMA(0.5), curve],
        max_steps=3,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, Rows(trainer, 3, 96), Rows(trainer, 2, 96))
    return [float(value) for value in curve.seen if value is not None], weights_of(module)


# A model without a plan is refused under tensor parallelism, which test_sharded_extras shows.
KINDS = [(name, kind) for name in SHARED for kind in (Told, Asked, Foreign) if kind is not Foreign or name[:3] != "tp2"]


@pytest.mark.parametrize(("strategy", "kind"), KINDS)
def test_perplexity_between_steps(ranks, strategy, kind):
    losses, weights = alone(evaluated, kind)
    assert len(losses) == 3
    for found, found_weights in ranks(2).run(evaluated, strategy, kind):
        assert found == pytest.approx(losses, rel=1e-6)
        assert_same(found_weights, weights, 1e-6)


class Peek(Callback):
    """Runs the model when gradients are there, just before the weights change."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with torch.no_grad():
            pl_module.model(torch.arange(12)[None])


def peeked(strategy):
    return run(STRATEGIES[strategy](), callbacks=[Peek()])[2]


@pytest.mark.parametrize("strategy", SHARED)
def test_a_model_that_is_run_before_a_step_does_not_keep_old_weights(ranks, strategy):
    for found in ranks(2).run(peeked, strategy):
        assert_same(found, alone(peeked), 1e-8)


# --- kernels ---


class Watch(KernelSwap):
    """Keeps what was exchanged, which is put back at the end."""

    def on_train_end(self, trainer, pl_module):
        self.kernels = sorted({entry.kernel for entry in self.swapped})
        self.exchanged = [entry.method in vars(entry.layer) for entry in self.swapped if entry.kernel]


def with_kernels(strategy, twice=False):
    watch = Watch()
    layers = Layer(mixer=Attention(num_heads=4, num_kv_heads=2, qk_norm="head"), ffn=GLU(hidden_size=32))
    module = PretrainModule(model_config(layers=layers), optimizer=SGD(lr=0.1), schedule=Constant())
    for _ in range(1 + twice):
        losses, _, weights = run(STRATEGIES[strategy](), module=module, callbacks=[watch], steps=3, double=False)
    return losses, weights, watch.kernels, all(watch.exchanged)


@pytest.mark.parametrize("strategy", SHARED)
def test_exchanged_kernels(ranks, strategy):
    losses, weights, kernels, _ = alone(with_kernels)
    for found, found_weights, found_kernels, exchanged in ranks(2).run(with_kernels, strategy):
        assert found_kernels == kernels
        assert exchanged
        assert found == pytest.approx(losses, rel=1e-6)
        assert_same(found_weights, weights, 1e-6)


def a_second_run_with_kernels(strategy):
    with pytest.raises(ConfigurationError) as caught:
        with_kernels(strategy, twice=True)
    return str(caught.value)


def test_layers_that_an_earlier_run_has_cut_are_not_tried(ranks):
    for said in ranks(2).run(a_second_run_with_kernels, "fsdp2"):
        assert "its weights are sharded since an earlier run" in said


# --- samples ---


class Keep(SampleText):
    def _complete(self, trainer, module):
        self.texts = super()._complete(trainer, module)
        return self.texts


def sampled(strategy):
    torch.manual_seed(1)
    module = PretrainModule(model_config(TOKENIZER.vocab_size), optimizer=SGD(lr=0.1), schedule=Constant())
    keep = Keep(["12=", "3", "4567"], max_new_tokens=8, tokenizer=TOKENIZER)
    trainer = trainer_for(STRATEGIES[strategy](), callbacks=[keep], max_steps=3)
    trainer.fit(module, Rows(trainer, 3, TOKENIZER.vocab_size))
    return keep.texts


@pytest.mark.parametrize("strategy", SHARED)
def test_samples(ranks, strategy):
    assert ranks(2).run(sampled, strategy) == [alone(sampled)] * 2


# --- the ledger ---


def recorded(strategy, path):
    torch.manual_seed(1)
    module = PretrainModule(model_config(), optimizer=SGD(lr=0.1), schedule=Constant())
    trainer = trainer_for(STRATEGIES[strategy](), callbacks=[Perplexity(), ScalingLaw(path)], max_steps=3)
    trainer.fit(module, Rows(trainer, 3, 96), Rows(trainer, 1, 96))
    return trainer.is_global_zero


@pytest.mark.parametrize("strategy", SHARED)
def test_the_ledger(ranks, tmp_path, strategy):
    recorded("one", tmp_path / "one.jsonl")
    ranks(2).run(recorded, strategy, tmp_path / "two.jsonl")
    (wanted,), (found,) = (RunLedger(tmp_path / f"{name}.jsonl").read() for name in ("one", "two"))
    assert found.tokens == wanted.tokens == 3 * 8 * 12
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert [loss for _, loss in found.curve] == pytest.approx([loss for _, loss in wanted.curve], rel=1e-6)
    assert (found.parameters, found.flops_per_token) == (wanted.parameters, wanted.flops_per_token)


# --- the noise of gradients ---

DIM, ROWS, MICRO_BATCHES = 6, 2, 3


class Quadratic(LightningModule):
    """The gradient of an example is ``weight - example``; the weight stays where it is."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(DIM, 1, bias=False)
        nn.init.constant_(self.map.weight, 2.0)

    def training_step(self, batch, batch_idx):
        return (self.map.weight - batch).square().sum(1).mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def examples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, MICRO_BATCHES, 2 * ROWS, DIM, generator=generator)


def noise_scale(strategy):
    trainer = trainer_for(
        STRATEGIES[strategy](),
        callbacks=[GradientNoiseScale(memory=0.5)],
        accumulate_grad_batches=MICRO_BATCHES,
        max_epochs=1,
        use_distributed_sampler=False,
    )
    rank = trainer.global_rank
    mine = examples().flatten(0, 1)[:, ROWS * rank : ROWS * (rank + 1)]
    trainer.fit(Quadratic(), DataLoader(mine, batch_size=None))
    return [float(trainer.callback_metrics[f"noise/{name}"]) for name in ("signal", "trace")]


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_the_noise_of_gradients(ranks, strategy):
    found = ranks(2).run(noise_scale, strategy)
    small, big = ROWS, 2 * ROWS * MICRO_BATCHES
    for rank in range(2):
        signal = trace = 0.0
        for step in examples().double():
            own = (2 - step[0, ROWS * rank : ROWS * (rank + 1)].mean(0)).square().sum().item()
            whole = (2 - step.flatten(0, 1).mean(0)).square().sum().item()
            # Expected squared norms are signal + trace / size: two equations.
            trace += 0.5 * ((own - whole) / (1 / small - 1 / big) - trace)
            signal += 0.5 * ((big * whole - small * own) / (big - small) - signal)
        assert found[rank] == pytest.approx([signal, trace], rel=1e-5)


def refused_noise_scale(strategy):
    with pytest.raises(ConfigurationError) as caught:
        run(STRATEGIES[strategy](), callbacks=[GradientNoiseScale()], accumulate_grad_batches=2)
    return str(caught.value)


@pytest.mark.parametrize("strategy", ["zero2", "fsdp2", "tp2"])
def test_the_noise_of_gradients_that_no_rank_holds(ranks, strategy):
    for said in ranks(2).run(refused_noise_scale, strategy):
        assert "no rank has it. Use the strategy ddp or zero1" in said


# --- what fails on one rank only ---


class Trips(nn.Module):
    """Fails on one rank, in evaluation only: what observers run."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        if not self.training and distributed.get_rank() == 1:
            raise Odd
        return self.model(*args, **kwargs)


class Odd(Exception):  # noqa: N818
    pass


class Observed(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = Trips(nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16)))

    def forward(self, input_ids):
        return self.net(input_ids)

    def training_step(self, batch, index):
        ids = batch["input_ids"]
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def validation_step(self, batch, index):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def observed(callbacks):
    trainer = trainer_for(STRATEGIES["zero2"](), callbacks=callbacks, max_epochs=2, num_sanity_val_steps=0)
    rows = DataLoader([{"input_ids": row, "labels": row} for row in torch.arange(48).view(6, 8) % 12], batch_size=2)
    module = Observed()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, rows, rows)
    return weights_of(module), [str(one.message) for one in said]


def test_an_observer_that_fails_on_one_rank_stops_on_all(ranks):
    """Neither ends the run nor leaves the others waiting; the first rank says it once."""
    sampler = SampleText(["1"], tokenizer=TOKENIZER, max_new_tokens=2, every_n_steps=1)
    (weights, said), (others, _) = ranks(2).run(observed, [sampler, Perplexity()])
    unobserved, _ = ranks(2).run(observed, [])[0]
    assert_same(weights, unobserved, 0)
    assert_same(others, unobserved, 0)
    for name in ("SampleText", "Perplexity"):
        assert [name in line and "on another rank" in line for line in said].count(True) == 1, said

"""The noise scale on a problem whose answer is known: examples around a mean, and a parameter that stays in place."""

import numpy as np
import pytest
import torch
from quadratic_problem import DIM, NOISE_SCALE, SIGMA, Quadratic
from torch.utils.data import DataLoader

from lightning_lm.callbacks import GradientNoiseScale
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.scaling import fit_critical_batch, noise_moments


@pytest.mark.parametrize("constant", [1.0, 1e-4])
def test_within_ten_percent_of_the_closed_form(constant, trainer_with):
    examples = SIGMA * torch.randn(9600, DIM, generator=torch.Generator().manual_seed(0))
    callback = GradientNoiseScale(memory=0.999)
    trainer = trainer_with(callback, max_epochs=1, accumulate_grad_batches=8, log_every_n_steps=10)
    trainer.fit(Quadratic(constant), DataLoader(examples, batch_size=3))
    assert float(trainer.callback_metrics["noise/batch_size"]) == pytest.approx(NOISE_SCALE, rel=0.1)
    assert trainer.global_step == 400


def test_ratios_of_single_steps_would_be_wrong():
    """Why the two are averaged first; the same numbers show that each estimate has no bias."""
    random = np.random.default_rng(0)
    distance = 0.8
    mean = np.full(DIM, distance / DIM**0.5)
    moments = []
    for _ in range(4000):
        gradients = mean + SIGMA * random.standard_normal((64, DIM))
        small, big = (np.square(gradients[:n].mean(0)).sum() for n in (8, 64))
        moments.append(noise_moments(small, big, small=8, big=64))
    signal, noise = np.mean(moments, axis=0)
    assert signal == pytest.approx(distance**2, rel=0.05)
    assert noise == pytest.approx(DIM * SIGMA**2, rel=0.02)
    assert np.mean([one.noise / one.signal for one in moments if one.signal > 0]) > 1.3 * noise / signal
    with pytest.raises(DataError, match="second must be larger"):
        noise_moments(1.0, 1.0, small=8, big=8)


def test_our_modules_sums_are_seen_as_means(trainer_with, batches_of, loader_of):
    """Twelve equal rows: every micro-batch has the step's gradient, and nothing is noise."""
    layer = Layer(mixer=Attention(num_heads=2))
    config = TransformerConfig(vocab_size=256, d_model=16, num_layers=1, layers=layer, context_length=8)
    batches = batches_of([(2, 9)], ignored=0.0) * 12
    trainer = trainer_with(GradientNoiseScale(), max_epochs=1, accumulate_grad_batches=3, log_every_n_steps=1)
    trainer.fit(PretrainModule(config), loader_of(batches))
    metrics = trainer.callback_metrics
    assert abs(float(metrics["noise/trace"])) < 1e-3 * float(metrics["noise/signal"])


def test_without_accumulation_it_says_what_to_set(trainer_with):
    with pytest.raises(ConfigurationError, match="Set it to 2 or more"):
        trainer_with(GradientNoiseScale(), max_epochs=1).fit(Quadratic(), DataLoader(torch.zeros(4, DIM), batch_size=2))
    with pytest.raises(ConfigurationError, match="no share"):
        GradientNoiseScale(memory=2.0)


def test_the_critical_batch_size_comes_back():
    sizes = np.array([8, 16, 32, 64, 128, 256, 512.0])
    found = fit_critical_batch(sizes, 1000 * (1 + 90 / sizes))
    assert found.batch_size.value == pytest.approx(90, rel=1e-5)
    assert found.min_steps.value == pytest.approx(1000, rel=1e-5)
    noisy = 1000 * (1 + 90 / sizes) * np.exp(0.02 * np.random.default_rng(1).standard_normal(7))
    assert 90 in fit_critical_batch(sizes, noisy).batch_size
    with pytest.raises(DataError, match="needed are 4"):
        fit_critical_batch([1, 2], [2, 1])

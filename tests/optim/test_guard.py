"""Which steps are skipped."""

import math
import statistics

import pytest
import torch

from lightning_lm.optim import NonFinite, NormHistory, Spike


def norms(count: int, seed: int = 0) -> list[float]:
    """Gradient norms that vary by factors, as real ones do."""
    return (0.3 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).exp().tolist()


def test_the_history_is_the_plain_average_at_first():
    history, values = NormHistory(), norms(50)
    for value in values:
        history.add(value, window=100)
    logs = [math.log(value) for value in values]
    assert history.mean == pytest.approx(statistics.fmean(logs), abs=1e-12)
    assert history.variance == pytest.approx(statistics.pvariance(logs), rel=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rule", [NonFinite(), Spike()])
def test_non_finite_steps_are_skipped_and_not_remembered(rule, value):
    history = NormHistory()
    assert str(value) in rule.reason(value, history)
    assert history == NormHistory()


def test_ordinary_steps_are_taken():
    rule, history = Spike(), NormHistory()
    assert not any(rule.reason(value, history) for value in norms(3000))


def test_a_spike_is_skipped_and_not_remembered():
    rule, history = Spike(), NormHistory()
    for value in norms(100):
        assert rule.reason(value, history) is None
    mean = history.mean
    assert "100" in rule.reason(100.0, history)
    assert history.mean == mean


def test_nothing_is_a_spike_at_the_start():
    rule, history = Spike(warmup=10), NormHistory()
    assert not any(rule.reason(value, history) for value in (0.1, 1000.0, 0.1, 1e6))


def test_a_steady_norm_may_double():
    rule, history = Spike(min_factor=2.0), NormHistory()
    for _ in range(100):
        rule.reason(1.0, history)
    assert rule.reason(1.99, history) is None
    assert rule.reason(2.5, history) is not None


def test_a_norm_of_zero_is_taken_and_not_remembered():
    history = NormHistory()
    assert Spike().reason(0.0, history) is None
    assert history == NormHistory()

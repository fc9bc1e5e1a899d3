"""Which source gives which row."""

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lm.data.mixture import Interleaving
from lightning_lm.errors import ConfigurationError


@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_every_prefix_has_the_right_proportions_within_one_row(weights):
    order = Interleaving(weights)
    sources, _ = order.locate(np.arange(3 * sum(weights) + 5))
    given_so_far = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    for n, row in enumerate(given_so_far.tolist(), start=1):
        for count, weight in zip(row, weights, strict=True):
            assert abs(count - Fraction(n * weight, sum(weights))) < 1


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=5))
@settings(max_examples=20, deadline=None)
def test_weights_without_a_common_denominator_are_kept_closely(weights):
    order = Interleaving(weights)
    wanted = np.array(weights) / sum(weights)
    assert np.abs(order.counts / order.period - wanted).max() < 2 * len(weights) / 65536


@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=5), first=st.integers(0, 10**12))
@settings(max_examples=50, deadline=None)
def test_each_source_gives_its_rows_in_order_without_a_gap(weights, first):
    sources, ranks = Interleaving(weights).locate(np.arange(first, first + 200))
    for k in range(len(weights)):
        of_source = ranks[sources == k]
        assert np.array_equal(
            of_source, np.arange(of_source[0], of_source[0] + len(of_source)) if len(of_source) else []
        )


def test_simple_weights_are_exact_and_far_rows_cost_nothing():
    order = Interleaving([0.7, 0.2, 0.1])
    assert order.period == 10
    begin = time.process_time()
    sources, ranks = order.locate(np.array([10**17]))
    assert time.process_time() - begin < 5  # to count there takes years
    assert ranks[0] == order.counts[sources[0]] * 10**16


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_cannot_work_are_refused(weights):
    with pytest.raises(ConfigurationError, match="positive"):
        Interleaving(weights)

import math

import numpy as np
import pytest
from scipy import stats

from lightning_lm.errors import DataError
from lightning_lm.evals.statistics import (
    bootstrap_scores,
    mcnemar_p_value,
    paired_difference,
    score_of,
    standard_error,
    wilson_interval,
)


def test_the_error_of_an_accuracy_is_the_closed_form():
    right = [1.0] * 818 + [0.0] * 501
    assert standard_error(right) == pytest.approx(math.sqrt(818 / 1319 * 501 / 1319 / 1319), rel=1e-12)
    assert standard_error([1.0] * 62 + [0.0] * 38) == pytest.approx(math.sqrt(0.62 * 0.38 / 100))


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (7, 10), (620, 1000)])
def test_the_interval_of_an_accuracy_is_that_of_scipy(right, count):
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson_interval(right / count, count) == pytest.approx((expected.low, expected.high))
    score = score_of([1.0] * right + [0.0] * (count - right))
    assert (score.low, score.high) == pytest.approx((expected.low, expected.high))


def test_copies_of_an_item_in_one_cluster_add_no_certainty():
    values = np.random.default_rng(0).normal(size=50).tolist()
    copied = [value for value in values for _ in range(4)]
    clusters = [str(index) for index in range(50) for _ in range(4)]
    assert standard_error(copied, clusters) == pytest.approx(standard_error(values))
    assert standard_error(copied) == pytest.approx(standard_error(values) / 2)
    right = [float(value > 0) for value in copied]
    single, many = score_of([float(value > 0) for value in values]), score_of(right, clusters)
    assert (many.low, many.high, many.num_clusters) == pytest.approx((single.low, single.high, 50))


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (3, 9), (40, 41)])
def test_mcnemar_is_the_binomial_test(first, second):
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_p_value(first, second) == pytest.approx(expected)


def test_a_paired_difference_knows_what_the_two_share():
    generator = np.random.default_rng(0)
    difficulty = generator.normal(size=1000) * 10
    second = (difficulty + generator.normal(size=1000)).tolist()
    first = (difficulty + 0.3 + generator.normal(size=1000)).tolist()
    found = paired_difference(first, second)
    paired = stats.ttest_rel(first, second)
    assert found.value == pytest.approx(np.mean(first) - np.mean(second))
    assert (found.low, found.high) == pytest.approx(tuple(paired.confidence_interval()), abs=0.015)
    assert found.p_value < 0.001
    assert stats.ttest_ind(first, second).pvalue > 0.3  # apart, nothing is seen
    assert found.mcnemar_p_value is None


def test_equal_models_do_not_differ():
    right = [1.0, 0.0, 1.0, 1.0]
    found = paired_difference(right, right)
    assert (found.value, found.low, found.high, found.p_value, found.mcnemar_p_value) == (0, 0, 0, 1, 1)
    with pytest.raises(DataError, match="no pairs"):
        paired_difference([1.0], [1.0, 0.0])


def test_the_bootstrap_of_a_ratio_has_the_error_of_the_delta_method():
    generator = np.random.default_rng(1)
    lengths = generator.uniform(50, 150, 400)
    losses = lengths * 2 + generator.normal(size=400) * 20

    def aggregate(indices):
        return {"loss": losses[indices].sum() / lengths[indices].sum()}

    score = bootstrap_scores(aggregate, 400, num_samples=1000)["loss"]
    ratio = losses.sum() / lengths.sum()
    assert score.value == pytest.approx(ratio)
    expected = math.sqrt(((losses - ratio * lengths) ** 2).sum()) / lengths.sum()
    assert score.standard_error == pytest.approx(expected, rel=0.1)
    assert score.low < ratio < score.high


def test_a_single_item_has_no_error():
    score = score_of([1.0])
    assert math.isnan(score.standard_error)
    assert score.high == 1.0
    assert math.isnan(bootstrap_scores(lambda indices: {"x": 1.0}, 1)["x"].low)


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("value", [0.25, 0.5])
def test_items_that_are_all_tied_are_no_certainty(value, count):
    score = score_of([value] * count)
    assert (score.low, score.high) == pytest.approx(wilson_interval(value, count))
    assert score_of([value] * count, ["same"] * count).high == pytest.approx(wilson_interval(value, 1)[1])


def test_the_interval_of_fractions_has_the_width_of_their_error_and_stays_within_one():
    values = np.random.default_rng(0).beta(4, 1, 400)
    score = score_of(values.tolist())
    assert score.high - score.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.01)
    assert score_of([1.0] * 30 + [0.9]).high <= 1
    # A cost between 0 and 1 is no fraction.
    cost = score_of([0.8, 1.0, 1.0], is_fraction=False)
    assert cost.high - cost.value == pytest.approx(cost.value - cost.low)
    assert cost.high > 1


def test_mcnemar_needs_independent_items():
    first, second = [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    assert paired_difference(first, second, ["a", "b", "c", "d"]).mcnemar_p_value == pytest.approx(0.25)
    assert paired_difference(first, second, ["a", "a", "a", "d"]).mcnemar_p_value is None

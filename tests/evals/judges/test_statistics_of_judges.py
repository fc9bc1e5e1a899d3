"""Length control, Bradley-Terry and kappa against closed forms, scipy and slow iterations."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.evals.judges import Battle, cohens_kappa, fit_bradley_terry, length_controlled_win_rate
from lightning_lm.evals.judges.agreement import agreement_scores


def likelihood(x, y, ridge):
    return lambda theta: np.logaddexp(0, theta[0] + theta[1] * x).sum() - y @ (theta[0] + theta[1] * x) + ridge * theta[
        1
    ] ** 2 / 2  # fmt: skip


@pytest.mark.parametrize("ridge", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("soft", [False, True])
def test_length_control_is_a_penalised_logistic_regression(ridge, soft):
    where = np.random.default_rng(3)
    lengths = where.normal(80, 150, 120)
    x = np.tanh(lengths / lengths.std())
    y = (where.random(120) < 1 / (1 + np.exp(-0.2 - 1.5 * x))).astype(float)
    y[:30] = 0.5 if soft else y[:30]
    expected = minimize(likelihood(x, y, ridge), [0.0, 0.0], tol=1e-12).x
    found = length_controlled_win_rate(y.tolist(), lengths.tolist(), ridge=ridge)
    assert (found.quality, found.length) == pytest.approx(expected, abs=1e-5)
    assert found.win_rate == pytest.approx(1 / (1 + math.exp(-expected[0])), abs=1e-6)


def test_length_control_is_antisymmetric_and_plain_without_lengths():
    y, lengths = [1, 1, 0.5, 0, 1, 0], [50, 20, -10, -60, 40, 5]
    one = length_controlled_win_rate(y, lengths).win_rate
    other = length_controlled_win_rate([1 - value for value in y], [-length for length in lengths]).win_rate
    assert one + other == pytest.approx(1)
    assert one < np.mean(y), "the longer answers won"
    assert length_controlled_win_rate(y, [0] * 6).win_rate == pytest.approx(np.mean(y))


@pytest.mark.parametrize(
    ("preferences", "lengths", "expected"),
    [
        ([1, 1, 1], [5, 9, -3], 1.0),
        ([0], [5], 0.0),
        ([1, 0, 1], [7, 7, 7], math.nan),
        ([1, 1, 0, 0], [1e9, 1e9, -1e9, -1e9], 0.5),  # separated by length alone
    ],
)
def test_length_control_at_its_ends(preferences, lengths, expected):
    found = length_controlled_win_rate(preferences, lengths).win_rate
    assert found == pytest.approx(expected, nan_ok=True)


def duel(first, second, wins, ties, losses, cluster="x"):
    return [Battle(first, second, score, cluster) for score in [1.0] * wins + [0.5] * ties + [0.0] * losses]


def test_ratings_of_two_models_have_a_closed_form():
    found = fit_bradley_terry(duel("a", "b", 7, 4, 2), anchor="b", anchor_rating=1200)
    assert found["a"].rating == pytest.approx(1200 + 400 * math.log10(9 / 4))
    assert (found["b"].rating, found["b"].low, found["b"].high) == (1200, 1200, 1200)
    assert (found["a"].win_rate, found["a"].num_battles) == (pytest.approx(9 / 13), 13)


def slow_ratings(battles, models):
    """Hunter's minorisation iteration, one model after the other."""
    strengths = dict.fromkeys(models, 1.0)
    for _ in range(4000):
        for model in models:
            won = sum(b.score if b.first == model else 1 - b.score for b in battles if model in (b.first, b.second))
            weight = sum(
                1 / (strengths[b.first] + strengths[b.second]) for b in battles if model in (b.first, b.second)
            )
            strengths[model] = won / weight
    return {model: 400 * math.log10(strengths[model] / strengths[models[0]]) for model in models}


def test_ratings_of_several_models_are_those_of_a_slow_iteration():
    battles = [
        *duel("a", "b", 5, 1, 3), *duel("b", "c", 4, 2, 2), *duel("c", "a", 1, 1, 3), *duel("d", "a", 1, 0, 6),
    ]  # fmt: skip
    found = fit_bradley_terry(battles, num_bootstraps=0)
    assert {one.model: one.rating - 1000 for one in found.ratings} == pytest.approx(
        slow_ratings(battles, "abcd"), abs=1e-4
    )
    assert [one.model for one in found.ratings] == ["a", "b", "c", "d"]


def test_a_model_that_nobody_beat_has_no_finite_rating_and_disturbs_no_other():
    pair = duel("a", "b", 3, 0, 1)
    found = fit_bradley_terry([*pair, *duel("best", "a", 5, 0, 0), *duel("worst", "b", 0, 0, 5)], anchor="b")
    assert (found["best"].rating, found["worst"].rating) == (math.inf, -math.inf)
    assert found["a"].rating == pytest.approx(1000 + 400 * math.log10(3))
    assert [one.model for one in found.ratings] == ["best", "a", "b", "worst"]
    apart = fit_bradley_terry([*pair, *duel("c", "d", 1, 0, 1)])
    assert math.isnan(apart["c"].rating)


def test_intervals_are_over_prompts_not_over_verdicts():
    where = np.random.default_rng(0)
    scores = (where.random(100) < 0.7).astype(float)
    once = [Battle("a", "b", score, str(index)) for index, score in enumerate(scores)]
    one = fit_bradley_terry(once, anchor="b", num_bootstraps=2000)["a"]
    thrice = fit_bradley_terry(once * 3, anchor="b", num_bootstraps=2000)["a"]
    assert (one.low, one.high) == pytest.approx((thrice.low, thrice.high))
    p = scores.mean()
    error = 400 / math.log(10) / math.sqrt(100 * p * (1 - p))  # of the logit, by the delta method
    assert (one.high - one.low) / 2 / 1.96 == pytest.approx(error, rel=0.15)


def test_what_is_no_comparison_is_refused():
    with pytest.raises(DataError, match="no comparisons"):
        fit_bradley_terry([])
    with pytest.raises(ConfigurationError, match="'z' is none"):
        fit_bradley_terry(duel("a", "b", 1, 0, 1), anchor="z")
    with pytest.raises(DataError, match="score from 0 to 1"):
        fit_bradley_terry([Battle("a", "b", 2.0, "x")])


def test_kappa_of_a_table():
    """Cohen's example of two raters: 20 and 15 agreements, 5 and 10 disagreements."""
    first = "y" * 25 + "n" * 25
    second = "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15
    assert cohens_kappa(first, second) == pytest.approx((0.7 - 0.5) / 0.5)
    assert math.isnan(cohens_kappa("aaa", "aaa"))
    assert cohens_kappa("abab", "baba") == pytest.approx(-1)
    scores = agreement_scores(list("aab"), list("abb"))
    assert scores["agreement"].value == pytest.approx(2 / 3)
    assert set(agreement_scores(list("aa"), list("aa"))) == {"agreement"}

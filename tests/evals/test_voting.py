"""Votes of several completions, beside all subsets of them, one by one."""

import itertools
import math

import numpy as np
import pytest

from lightning_lm.errors import ConfigurationError
from lightning_lm.evals import best_of, majority_at, pass_at, vote_weights, weighted_vote
from lightning_lm.evals.tasks.generation_task import sampled_metrics
from lightning_lm.evals.tasks.verdicts import Verdict


def draws():
    """Completions of one question: answers, of which some are missing, their values, and scores with ties."""
    generator = np.random.default_rng(0)
    for number in (1, 2, 5, 7):
        for _ in range(6):
            answers = [str(answer) if answer else None for answer in generator.integers(0, 4, number)]
            values = [float(answer == "2") for answer in answers]
            yield answers, values, generator.integers(-2, 3, number).astype(float).tolist()


def value_of_majority(answers, values):
    counts = {answer: answers.count(answer) for answer in answers if answer is not None}
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    return sum(values[answers.index(winner)] for winner in winners) / len(winners) if winners else 0.0


def value_of_best(values, scores):
    best = [value for value, score in zip(values, scores, strict=True) if score == max(scores)]
    return sum(best) / len(best)


def mean_over_subsets(value, k, *columns):
    """Mean over the subsets of k of a function of columns."""
    subsets = itertools.combinations(zip(*columns, strict=True), k)
    found = [value(*map(list, zip(*subset, strict=True))) for subset in subsets]
    return sum(found) / len(found)


def test_estimates_are_means_over_all_subsets():
    for answers, values, scores in draws():
        number = len(answers)
        for k in range(1, number + 1):
            majority = mean_over_subsets(value_of_majority, k, answers, values)
            assert majority_at(answers, values, k) == pytest.approx(majority)
            assert best_of(values, scores, k) == pytest.approx(mean_over_subsets(value_of_best, k, values, scores))
            one = mean_over_subsets(lambda chosen: float(any(chosen)), k, values)
            assert pass_at(np.array([int(sum(values))]), number, k)[0] == pytest.approx(one)


def test_a_weighted_vote_with_equal_weights_is_the_majority_of_all_and_whole_weights_are_copies():
    for answers, values, scores in draws():
        assert weighted_vote(answers, values, [0.3] * len(answers)) == pytest.approx(value_of_majority(answers, values))
        copies = [int(score + 2) for score in scores]
        many = [(a, v) for a, v, copy in zip(answers, values, copies, strict=True) for _ in range(copy)]
        if any(answer is not None for answer, _ in many):
            expected = value_of_majority([a for a, _ in many], [v for _, v in many])
            assert weighted_vote(answers, values, copies) == pytest.approx(expected)


def test_scores_of_a_reward_model_weigh_by_their_exponential_and_more_votes_never_cost():
    # Ten votes of -0.5 are not worth -5: they beat one of -1.
    answers, values = ["a"] * 10 + ["b"], [1.0] * 10 + [0.0]
    ranks = [-0.5] * 10 + [-1.0]
    verdicts = [Verdict(value, answer) for value, answer in zip(values, answers, strict=True)]
    assert sampled_metrics("x", verdicts, ranks)["x_weighted@11"] == 1.0
    # A shift of log-odds changes nothing; one without a score does not vote.
    for shift in (0.0, 5000.0):
        weights = vote_weights([-1.0 - shift, -2.0 - shift, -math.inf])
        assert weights == pytest.approx([1.0, math.exp(-1), 0.0])
    assert vote_weights([0.2, 0.9, -math.inf]) == [0.2, 0.9, 0.0]
    with pytest.raises(ConfigurationError, match=r"at least 0, got -0\.5"):
        weighted_vote(["a"], [1.0], [-0.5])

"""Test-time compute with several completions of a prompt: majority and weighted votes, and the best by a score.

All estimates average over the subsets of ``k`` of the ``n`` completions, exactly, instead of taking the first ``k``.
"""

import math
from collections.abc import Hashable, Mapping, Sequence

from lightning_lm.errors import ConfigurationError

__all__ = ["best_of", "majority_at", "vote_weights", "weighted_vote"]


def majority_at(answers: Sequence[Hashable | None], values: Sequence[float], k: int) -> float:
    """Return maj@k: the expected value of the answer that most of ``k`` completions give (self-consistency).

    Answers with equally many votes share the win. A completion without an answer does not vote; if none of ``k`` has
    one, the value is 0.

    Args:
        answers: Answer of each completion, in a form in which equal answers are equal; ``None`` if it has none.
        values: Value of each answer: 1 if it is right. Completions with the same answer have the same value.
        k: Completions that vote; at most as many as there are.

    Raises:
        ConfigurationError: If there are fewer completions.

    Source:
        Wang et al. 2022, arXiv:2203.11171.

    Example:
        >>> round(majority_at(["8"] * 12 + ["9"] * 8, [1.0] * 12 + [0.0] * 8, k=5), 6)
        0.703818
    """
    _check(k, len(answers))
    counts: dict[Hashable, int] = {}
    worth: dict[Hashable, float] = {}
    for answer, value in zip(answers, values, strict=True):
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
            worth[answer] = value
    abstaining = len(answers) - sum(counts.values())
    groups: dict[tuple[int, float], int] = {}
    for answer, count in counts.items():
        groups[count, worth[answer]] = groups.get((count, worth[answer]), 0) + 1
    won = math.fsum(
        value * number * sum(_wins_with(most, count, (count, value), groups, abstaining, k) for most in range(1, k + 1))
        for (count, value), number in groups.items()
        if value
    )
    return won / math.comb(len(answers), k)


def _wins_with(
    most: int,
    count: int,
    own: tuple[int, float],
    groups: Mapping[tuple[int, float], int],
    abstaining: int,
    k: int,
) -> float:
    """Return the number of subsets in which one answer has ``most`` votes and wins, tied ones in part."""
    if most > count:
        return 0.0
    ways = {(most, 1): math.comb(count, most)}  # by completions taken, and answers that have the most votes
    for (size, value), number in groups.items():
        for _ in range(number - ((size, value) == own)):
            ways = _with_answer(ways, size, most, k)
    return math.fsum(
        ways_of * math.comb(abstaining, k - taken) / ties for (taken, ties), ways_of in ways.items() if taken <= k
    )


def _with_answer(ways: Mapping[tuple[int, int], int], size: int, most: int, k: int) -> dict[tuple[int, int], int]:
    grown: dict[tuple[int, int], int] = {}
    for (taken, ties), number in ways.items():
        for votes in range(min(size, most, k - taken) + 1):
            key = (taken + votes, ties + (votes == most))
            grown[key] = grown.get(key, 0) + number * math.comb(size, votes)
    return grown


def best_of(values: Sequence[float], scores: Sequence[float], k: int) -> float:
    """Return best-of-k: the expected value of the completion with the highest score among ``k``.

    Completions with equal scores are equally likely to be taken.

    Args:
        values: Value of each completion: 1 if it is right.
        scores: Score of each completion by a reward model or verifier.
        k: Completions to choose from.

    Raises:
        ConfigurationError: If there are fewer completions.

    Example:
        >>> best_of([1.0, 0.0, 0.0], scores=[0.9, 0.5, 0.1], k=2)
        0.6666666666666666
    """
    _check(k, len(values))
    total, below = 0.0, 0
    for score in sorted(set(scores)):
        tied = [value for value, own in zip(values, scores, strict=True) if own == score]
        at_most = below + len(tied)
        total += (math.comb(at_most, k) - math.comb(below, k)) * math.fsum(tied) / len(tied)
        below = at_most
    return total / math.comb(len(values), k)


def weighted_vote(answers: Sequence[Hashable | None], values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the value of the answer with the largest sum of weights over all completions; draws share the win.

    Args:
        answers: Answer of each completion; ``None`` if it has none.
        values: Value of each answer.
        weights: Weight of each completion's vote, at least 0; `vote_weights` makes them of scores.

    Raises:
        ConfigurationError: If a weight is negative: the more votes an answer had, the less it would win.

    Example:
        >>> weighted_vote(["8", "9", "9"], [1.0, 0.0, 0.0], weights=[0.9, 0.2, 0.3])
        1.0
    """
    if any(not 0 <= weight < math.inf for weight in weights):
        raise ConfigurationError(
            f"The weights of a vote must be finite and at least 0, got {min(weights):g}. Make weights of the scores of "
            "a reward model: vote_weights(scores)."
        )
    sums: dict[Hashable, list[float]] = {}
    worth: dict[Hashable, float] = {}
    for answer, value, weight in zip(answers, values, weights, strict=True):
        if answer is not None:
            sums.setdefault(answer, []).append(weight)
            worth[answer] = value
    if not sums:
        return 0.0
    totals = {answer: math.fsum(each) for answer, each in sums.items()}
    most = max(totals.values())
    winners = [worth[answer] for answer, total in totals.items() if math.isclose(total, most, rel_tol=1e-9)]
    return math.fsum(winners) / len(winners)


def vote_weights(scores: Sequence[float]) -> list[float]:
    """Return the weights of the votes of scored completions of one prompt.

    Scores of a verifier, none of them negative, are weights as they are. Those of a reward model are log-odds
    (Bradley-Terry), some of them negative: the weights are their exponentials, relative to the largest, so that the sum
    of an answer's weights is proportional to the probability that the best completion gives it.

    Args:
        scores: Score of each completion; minus infinity for one that does not vote.

    Example:
        >>> vote_weights([0.0, 0.5])
        [0.0, 0.5]
        >>> vote_weights([-1000.0, -1000.0])
        [1.0, 1.0]
    """
    known = [score for score in scores if score > -math.inf]
    if not known or min(known) >= 0:
        return [max(score, 0.0) for score in scores]
    largest = max(known)
    return [math.exp(score - largest) for score in scores]


def _check(k: int, number: int) -> None:
    if not 1 <= k <= number:
        raise ConfigurationError(f"k={k} must be from 1 to the {number} completions there are; sample more.")


def powers_of_two(number: int) -> list[int]:
    """Return 1, 2, 4, ... up to a number, and the number itself: the k for which a curve is reported.

    Args:
        number: Completions.
    """
    sizes = [1]
    while sizes[-1] * 2 < number:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == number else [*sizes, number]

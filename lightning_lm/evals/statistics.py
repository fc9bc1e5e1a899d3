"""Statistics of scores: standard errors, intervals, and comparisons of two models on the same items.

Items that share a passage are not independent, so errors are computed over their clusters.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import DataError

__all__ = [
    "PairedDifference",
    "Score",
    "bootstrap_scores",
    "mcnemar_p_value",
    "normal_score",
    "paired_difference",
    "score_of",
    "standard_error",
    "wilson_interval",
]

_CONFIDENCE = 0.95
_CHUNK = 1 << 18
"""Numbers of bootstrap samples that are drawn at once."""


@dataclasses.dataclass(frozen=True)
class Score:
    """A score with its uncertainty.

    Args:
        value: The score.
        standard_error: Its standard error, over clusters; NaN for a single one.
        low: Lower end of the 95 % interval.
        high: Upper end of it.
        num_items: Items that it was computed from.
        num_clusters: Independent groups of items.
    """

    value: float
    standard_error: float
    low: float
    high: float
    num_items: int
    num_clusters: int


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Difference of two models' scores on the same items, first minus second.

    Args:
        value: The difference.
        standard_error: Its standard error, from the differences of the pairs.
        low: Lower end of the 95 % interval of a paired bootstrap.
        high: Upper end of it.
        p_value: Two-sided, of the bootstrap: how often the difference changes its sign.
        mcnemar_p_value: Exact test of McNemar; ``None`` unless every item is right or wrong, and independent of the
            others.
        num_items: Pairs.
    """

    value: float
    standard_error: float
    low: float
    high: float
    p_value: float
    mcnemar_p_value: float | None
    num_items: int


def standard_error(values: Sequence[float] | NDArray[np.float64], clusters: Sequence[str] | None = None) -> float:
    """Return the standard error of a mean: ``sqrt(p (1 - p) / n)`` for an accuracy.

    Args:
        values: One number an item.
        clusters: Name of the cluster of each item; by default each is its own.

    Source:
        Miller 2024, arXiv:2411.00640, equations 1 and 4.

    Example:
        >>> round(standard_error([1.0] * 62 + [0.0] * 38), 4)
        0.0485
    """
    numbers = np.asarray(values, dtype=np.float64)
    sums = _of_clusters(numbers - numbers.mean(), _indices(clusters, len(numbers)))
    return float(np.sqrt((sums**2).sum())) / len(numbers)


def wilson_interval(fraction: float, count: float, confidence: float = _CONFIDENCE) -> tuple[float, float]:
    """Return the interval of Wilson for a fraction; it stays between 0 and 1, also where none or all are right.

    Args:
        fraction: Fraction of right items.
        count: Items; for clustered ones the number of independent items with the same error.
        confidence: Probability that such intervals contain the true fraction.

    Source:
        Wilson 1927, Journal of the American Statistical Association 22, 209-212.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (fraction + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(fraction * (1 - fraction) / count + (z / (2 * count)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def score_of(
    values: Sequence[float], clusters: Sequence[str] | None = None, *, is_fraction: bool | None = None
) -> Score:
    """Return a mean with its standard error and 95 % interval: of Wilson for fractions, otherwise normal.

    The interval of Wilson is that of as many independent items, right or wrong, as would have the same standard error:
    no more than there are if each is right or wrong. Where all are alike the error is 0 and says nothing; then it is
    that of as many items as there are clusters.

    Args:
        values: A number an item.
        clusters: Name of the cluster of each item; by default each is its own.
        is_fraction: Each is right, wrong, or right in part; ``False`` for other numbers, even between 0 and 1. By
            default numbers between 0 and 1 are fractions.

    Raises:
        DataError: If there is no number.
    """
    if not values:
        raise DataError("There is no item with this score.")
    numbers, error = np.asarray(values, dtype=np.float64), standard_error(values, clusters)
    mean, num_clusters = float(numbers.mean()), len(values) if clusters is None else len(set(clusters))
    if is_fraction is None:
        is_fraction = bool(((numbers >= 0) & (numbers <= 1)).all())
    if is_fraction:
        spread = mean * (1 - mean)
        known = num_clusters > 1 and error**2 > 1e-12 * spread
        effective = spread / error**2 if known else float(num_clusters)
        low, high = wilson_interval(mean, min(effective, len(values)) if _is_binary(numbers) else effective)
    else:
        half = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2) * error
        low, high = mean - half, mean + half
    return Score(mean, error if num_clusters > 1 else math.nan, low, high, len(values), num_clusters)


def normal_score(value: float, error: float, count: int) -> Score:
    """Return a number with the normal 95 % interval of its standard error.

    Args:
        value: The number.
        error: Its standard error.
        count: Independent parts that it was computed from.
    """
    half = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2) * error
    return Score(value, error, value - half, value + half, count, count)


def bootstrap_scores(
    aggregate: Callable[[Sequence[int]], Mapping[str, float]],
    count: int,
    clusters: Sequence[str] | None = None,
    *,
    num_samples: int = 200,
    seed: int = 0,
) -> dict[str, Score]:
    """Return scores that are no means over items, with the standard errors and 95 % intervals of a bootstrap.

    Args:
        aggregate: Returns the scores of items, given by their indices, which may repeat.
        count: Items.
        clusters: Name of the cluster of each item; by default each is its own.
        num_samples: Bootstrap samples.
        seed: Seed of the bootstrap.
    """
    groups = _indices(clusters, count)
    members = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]
    generator, drawn = np.random.default_rng(seed), list[Mapping[str, float]]()
    for _ in range(num_samples if len(members) > 1 else 0):
        chosen = generator.integers(0, len(members), len(members))
        drawn.append(aggregate(np.concatenate([members[group] for group in chosen]).tolist()))
    scores = {}
    for metric, value in aggregate(range(count)).items():
        numbers = [sample[metric] for sample in drawn if metric in sample] or [math.nan]
        low, high = np.quantile(numbers, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
        scores[metric] = Score(value, float(np.std(numbers)), float(low), float(high), count, len(members))
    return scores


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p value that two models are equally often right where just one of them is.

    Args:
        only_first: Items that only the first answered rightly.
        only_second: Items that only the second answered rightly.

    Source:
        McNemar 1947, Psychometrika 12, 153-157, with the binomial distribution.

    Example:
        >>> mcnemar_p_value(0, 5)
        0.0625
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**count))


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[str] | None = None,
    *,
    num_samples: int = 5_000,
    seed: int = 0,
) -> PairedDifference:
    """Compare the means of two models on the same items, in the same order.

    Args:
        first: The first model's number of each item.
        second: The second model's.
        clusters: Name of the cluster of each item; by default each is its own.
        num_samples: Bootstrap samples.
        seed: Seed of the bootstrap.

    Raises:
        DataError: If there are no items, or not equally many.
    """
    if len(first) != len(second) or not first:
        raise DataError(f"{len(first)} and {len(second)} items are no pairs; compare results on the same items.")
    gains = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    drawn = _resampled_means(gains, _indices(clusters, len(gains)), num_samples, seed)
    low, high = np.quantile(drawn, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    independent = clusters is None or len(set(clusters)) == len(clusters)
    binary = independent and _is_binary(np.asarray([*first, *second]))
    return PairedDifference(
        float(gains.mean()),
        standard_error(gains, clusters),
        float(low),
        float(high),
        min(1.0, 2 * (tail + 1) / (num_samples + 1)),
        mcnemar_p_value(int((gains > 0).sum()), int((gains < 0).sum())) if binary else None,
        len(gains),
    )


def _resampled_means(
    values: NDArray[np.float64], groups: NDArray[np.int64], num_samples: int, seed: int
) -> NDArray[np.float64]:
    """Return the means of samples of as many clusters as there are, drawn with replacement."""
    sums, sizes = _of_clusters(values, groups), np.bincount(groups)
    generator, at_once = np.random.default_rng(seed), max(1, _CHUNK // len(sums))
    means = []
    for start in range(0, num_samples, at_once):
        drawn = generator.integers(0, len(sums), (min(at_once, num_samples - start), len(sums)), dtype=np.int32)
        counts = drawn.shape[1] if len(sums) == len(values) else sizes[drawn].sum(1)
        means.append(sums[drawn].sum(1) / counts)
    return np.concatenate(means)


def _of_clusters(values: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.bincount(groups, weights=values).astype(np.float64, copy=False)


def _indices(clusters: Sequence[str] | None, count: int) -> NDArray[np.int64]:
    if clusters is None:
        return np.arange(count)
    return np.asarray(np.unique(np.asarray(clusters), return_inverse=True)[1], dtype=np.int64)


def _is_binary(values: NDArray[np.float64]) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())

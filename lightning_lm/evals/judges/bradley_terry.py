"""Bradley-Terry ratings of several models from pairwise comparisons, by maximum likelihood, with a clustered bootstrap.

A tie counts as half a win of each. A model that no other one beats has no finite rating: the likelihood rises without
end. Such ratings are infinite here, and the others come from the comparisons among themselves, which is the limit.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import ConfigurationError, DataError

__all__ = ["Battle", "BradleyTerry", "Rating", "fit_bradley_terry"]

_SCALE = 400 / math.log(10)
"""Points of Elo for a natural unit of log-strength."""
_CONFIDENCE = 0.95
_ITERATIONS = 200
_Matrix = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Battle:
    """A comparison of two models.

    Args:
        first: Name of a model.
        second: Name of another.
        score: 1 if the first won, 0 if the second did, 0.5 for a tie, or a fraction.
        cluster: Name of the prompt or the like that comparisons share.
    """

    first: str
    second: str
    score: float
    cluster: str


@dataclasses.dataclass(frozen=True)
class Rating:
    """Rating of a model, in points of Elo: 400 more are odds of ten to one.

    Args:
        model: Name of the model.
        rating: The rating; infinite if the model won or lost against all others, NaN if no comparison connects it with
            the anchor.
        low: Lower end of the 95 % interval of a bootstrap over clusters.
        high: Upper end of it.
        win_rate: Mean of its scores.
        num_battles: Comparisons that it was in.
    """

    model: str
    rating: float
    low: float
    high: float
    win_rate: float
    num_battles: int


@dataclasses.dataclass(frozen=True)
class BradleyTerry:
    """Ratings of models, the highest first.

    Args:
        ratings: The ratings.
        anchor: Model whose rating was given.
    """

    ratings: Sequence[Rating]
    anchor: str

    def __getitem__(self, model: str) -> Rating:
        """Return the rating of a model."""
        return next(rating for rating in self.ratings if rating.model == model)


def fit_bradley_terry(
    battles: Sequence[Battle],
    *,
    anchor: str | None = None,
    anchor_rating: float = 1000.0,
    num_bootstraps: int = 500,
    seed: int = 0,
) -> BradleyTerry:
    """Fit the rating of each model: ``P(i beats j) = sigmoid((rating_i - rating_j) log(10) / 400)``.

    Args:
        battles: The comparisons.
        anchor: Model whose rating is fixed; by default the first one.
        anchor_rating: Rating of the anchor. Points of Elo.
        num_bootstraps: Bootstrap samples of clusters.
        seed: Seed of the bootstrap.

    Raises:
        DataError: If there is no comparison, or a score is not from 0 to 1.
        ConfigurationError: If the anchor is none of the models.

    Source:
        Bradley and Terry 1952, Biometrika 39, 324-345; existence: Ford 1957, American Mathematical Monthly 64, 28-33.

    Example:
        >>> won, lost = [Battle("a", "b", 1.0, "x")] * 3, [Battle("a", "b", 0.0, "y")]
        >>> round(fit_bradley_terry(won + lost, anchor="b", anchor_rating=0.0)["a"].rating, 1)  # 400 log10(3)
        190.8
    """
    models = list(dict.fromkeys(name for battle in battles for name in (battle.first, battle.second)))
    if len(models) < 2:
        raise DataError("There are no comparisons of two models; give the answers of at least two.")
    for battle in battles:
        if not 0 <= battle.score <= 1 or battle.first == battle.second:
            raise DataError(f"{battle} is no comparison of two models with a score from 0 to 1.")
    fixed = models[0] if anchor is None else anchor
    if fixed not in models:
        raise ConfigurationError(f"The anchor {fixed!r} is none of the models: {', '.join(models)}.")
    tables = _tables(battles, models)
    at = models.index(fixed)
    wins = tables.sum(0)
    value = _ratings(wins, at)
    drawn = np.random.default_rng(seed).multinomial(len(tables), np.full(len(tables), 1 / len(tables)), num_bootstraps)
    samples = [_ratings(np.tensordot(counts, tables, axes=1), at) for counts in drawn] or [
        np.full(len(models), math.nan)
    ]
    low, high = _quantiles(np.stack(samples))
    games = wins + wins.T
    found = [
        Rating(
            model,
            anchor_rating + float(value[index]),
            anchor_rating + float(low[index]),
            anchor_rating + float(high[index]),
            float(wins[index].sum() / games[index].sum()),
            round(games[index].sum()),
        )
        for index, model in enumerate(models)
    ]
    order = sorted(found, key=lambda one: (-math.inf if math.isnan(one.rating) else one.rating, one.win_rate))
    return BradleyTerry(order[::-1], fixed)


def _tables(battles: Sequence[Battle], models: Sequence[str]) -> _Matrix:
    """Return wins of the row's model over the column's, [clusters, models, models]."""
    index, clusters = {model: place for place, model in enumerate(models)}, dict[str, int]()
    for battle in battles:
        clusters.setdefault(battle.cluster, len(clusters))
    tables = np.zeros((len(clusters), len(models), len(models)))
    for battle in battles:
        first, second, place = index[battle.first], index[battle.second], clusters[battle.cluster]
        tables[place, first, second] += battle.score
        tables[place, second, first] += 1 - battle.score
    return tables


def _ratings(wins: _Matrix, anchor: int) -> _Matrix:
    """Return the ratings above the anchor's: finite for models with which wins and losses connect it both ways."""
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in range(max(1, math.ceil(math.log2(len(wins))))):
        reach = (reach.astype(np.int64) @ reach) > 0
    above, below = reach[:, anchor], reach[anchor]
    ratings = np.where(above, math.inf, np.where(below, -math.inf, math.nan))
    together = np.flatnonzero(above & below)
    ratings[together] = _SCALE * _maximum(wins[np.ix_(together, together)], int(np.searchsorted(together, anchor)))
    return ratings


def _maximum(wins: _Matrix, anchor: int) -> _Matrix:
    """Return the log-strengths of greatest likelihood by Newton's method; the anchor's is 0."""
    games, free = wins + wins.T, np.arange(len(wins)) != anchor
    theta = np.zeros(len(wins))
    if not free.any():
        return theta

    def cost(at: _Matrix) -> float:
        return float((wins * np.logaddexp(0.0, at[None] - at[:, None])).sum())

    value = cost(theta)
    for _ in range(_ITERATIONS):
        p = 0.5 * (1 + np.tanh((theta[:, None] - theta[None]) / 2))
        gradient = (games * p - wins).sum(1)
        curvature = -games * p * (1 - p)
        np.fill_diagonal(curvature, 0.0)
        np.fill_diagonal(curvature, -curvature.sum(1))
        step = np.zeros(len(wins))
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)], gradient[free])
        step *= min(1.0, 3.0 / max(3.0, float(np.abs(step).max())))
        while (lower := cost(theta - step)) > value + 1e-12 * abs(value) and np.abs(step).max() > 1e-12:
            step /= 2
        theta, value = theta - step, lower
        if np.abs(step).max() < 1e-10:
            break
    return theta


def _quantiles(samples: _Matrix) -> tuple[_Matrix, _Matrix]:
    """Return the ends of the intervals, without interpolation: samples may be infinite."""
    known = np.where(np.isnan(samples), -math.inf, samples), np.where(np.isnan(samples), math.inf, samples)
    low, high = (
        np.quantile(side, quantile, axis=0, method="inverted_cdf")
        for side, quantile in zip(known, ((1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2), strict=True)
    )
    return np.asarray(low), np.asarray(high)

"""Order of the rows of a weighted mixture: every prefix has the right proportions of the sources.

Random draws leave a mixture of 1 % off by a third after a thousand rows, and make a row depend on all rows before it.
A deadline schedule is never more than one row off, and any of its rows can be found alone.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import ConfigurationError

__all__ = ["Interleaving"]

_LONGEST_PERIOD = 1 << 16


class Interleaving:
    """A periodic order of sources in which, after n rows, source k has contributed n times its weight, within one row.

    Args:
        weights: One positive weight per source; only their ratios matter. Weights without a common denominator up to
            65,536 are rounded to multiples of 1/65,536 of the whole.

    Attributes:
        counts: Rows of each source in one period.
        period: Rows after which the order repeats.

    Raises:
        ConfigurationError: If a weight is not positive and finite, or there is none.

    Source:
        Tijdeman 1980, "The chairman assignment problem"; the schedule is the earliest deadline first order of
        Liu and Layland 1973, in which row j of a source is due between rows j/w and (j + 1)/w for its normalised weight
        w.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = np.asarray(_counts_in_period(weights), dtype=np.int64)
        self.period = int(self.counts.sum())
        self._source = _deadline_order(self.counts.tolist())
        self._rank = _ranks(self._source, len(self.counts))

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source that gives each row, and which row of that source it is."""
        period, place = np.divmod(indices, self.period)
        source = self._source[place]
        return source, period * self.counts[source] + self._rank[place]


def _counts_in_period(weights: Sequence[float]) -> list[int]:
    if not weights or any(not math.isfinite(weight) or weight <= 0 for weight in weights):
        raise ConfigurationError(
            f"The weights of a mixture must be positive numbers, got {list(weights)}. "
            "Leave a source out instead of giving it weight 0."
        )
    fractions = [Fraction(weight).limit_denominator(1_000_000) or Fraction(weight) for weight in weights]
    shares = [fraction / sum(fractions) for fraction in fractions]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= _LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    counts = [max(1, math.floor(share * _LONGEST_PERIOD)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * _LONGEST_PERIOD)
    for k in by_remainder[: max(0, _LONGEST_PERIOD - sum(counts))]:
        counts[k] += 1
    return counts


def _deadline_order(counts: list[int]) -> NDArray[np.int64]:
    """Give each row to the source that is due first among those whose next row may already come."""
    period = sum(counts)
    waiting = [(0, k, 0) for k in range(len(counts))]
    ready: list[tuple[int, int, int]] = []
    order = np.empty(period, dtype=np.int64)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, k, given = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(given + 1) * period // counts[k]), k, given))
        _, k, given = heapq.heappop(ready)
        order[place] = k
        if given + 1 < counts[k]:
            heapq.heappush(waiting, ((given + 1) * period // counts[k], k, given + 1))
    return order


def _ranks(order: NDArray[np.int64], num_sources: int) -> NDArray[np.int64]:
    """Return how often the source of each place came before it."""
    ranks = np.empty(len(order), dtype=np.int64)
    for k in range(num_sources):
        places = np.flatnonzero(order == k)
        ranks[places] = np.arange(len(places))
    return ranks

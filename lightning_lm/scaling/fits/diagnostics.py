"""Diagnostics of a fit, to read before trusting it, and rules for the runs that it leaves out."""

import abc
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_lm.parts import Limit, Part
from lightning_lm.scaling.fits.points import Points

__all__ = ["DropHighestLosses", "DropSmallestBudgets", "Finding", "KeepAll", "Outliers", "examine"]

Kind = Literal["range", "edge", "bias", "floor", "shape"]

_NARROW = 8.0
"""Sizes and data should span at least this factor; published sweeps span 100 and more."""


class Finding(NamedTuple):
    """A remark about a fit."""

    kind: Kind
    message: str


def examine(points: Points) -> tuple[Finding, ...]:
    """Return what is wrong with the plan of the runs: ranges that are too narrow, sizes and data that go together.

    Args:
        points: The runs that were fitted.
    """
    findings = []
    for name in ("parameters", "tokens", "flops"):
        span = float(getattr(points, name).max() / getattr(points, name).min())
        if span < _NARROW:
            message = f"{name} span only a factor of {span:.1f}; exponents from less than {_NARROW:g} are guesses."
            findings.append(Finding("range", message))
    related = np.corrcoef(np.log(points.parameters), np.log(points.tokens))[0, 1]
    if abs(related) > 0.95:
        message = (
            f"sizes and tokens go together (correlation {related:+.2f}), so the law cannot tell their effects apart."
        )
        findings.append(Finding("shape", message))
    return tuple(findings)


@dataclass(frozen=True, kw_only=True)
class Outliers(Part, abc.ABC):
    """Base of the policies. They look at what was run, never at residuals, so that a bootstrap repeats the fit."""

    @abc.abstractmethod
    def kept(self, points: Points) -> NDArray[np.bool_]:
        """Return a mask of the points that the fit uses.

        Args:
            points: All of them.
        """


@dataclass(frozen=True, kw_only=True)
class KeepAll(Outliers):
    """Every run counts."""

    def kept(self, points: Points) -> NDArray[np.bool_]:
        """Return all true."""
        return np.ones(len(points), dtype=bool)


@dataclass(frozen=True, kw_only=True)
class DropSmallestBudgets(Outliers, limits={"count": Limit.NON_NEGATIVE}):
    """Leave out the runs with the fewest FLOPs, which are often still in their warm-up.

    Args:
        count: Number of runs.
    """

    count: int = field(kw_only=False)

    def kept(self, points: Points) -> NDArray[np.bool_]:
        """Return false for the runs with the fewest FLOPs."""
        return _without_first(points.flops, self.count)


@dataclass(frozen=True, kw_only=True)
class DropHighestLosses(Outliers, limits={"count": Limit.NON_NEGATIVE}):
    """Leave out the runs with the highest loss.

    Args:
        count: Number of runs.

    Source:
        Besiroglu et al. 2024, arXiv:2404.10102, leave out five runs of Hoffmann et al.
    """

    count: int = field(kw_only=False)

    def kept(self, points: Points) -> NDArray[np.bool_]:
        """Return false for the runs with the highest loss."""
        return _without_first(-points.loss, self.count)


def _without_first(values: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    mask = np.ones(len(values), dtype=bool)
    mask[np.argsort(values, kind="stable")[:count]] = False
    return mask

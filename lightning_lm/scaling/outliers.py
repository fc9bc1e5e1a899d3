"""Rules for the runs that a fit leaves out: reported openly, as they can move a coefficient by a factor of six."""

import abc
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_lm.parts import Part
from lightning_lm.scaling.fits.points import Points

__all__ = ["DropHighestLosses", "DropSmallestBudgets", "KeepAll", "Outliers"]


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
class DropSmallestBudgets(Outliers):
    """Leave out the runs with the fewest FLOPs, which are often still in their warm-up.

    Args:
        count: Number of runs.
    """

    count: int

    def kept(self, points: Points) -> NDArray[np.bool_]:
        """Return false for the runs with the fewest FLOPs."""
        return _without_first(points.flops, self.count)


@dataclass(frozen=True, kw_only=True)
class DropHighestLosses(Outliers):
    """Leave out the runs with the highest loss.

    Args:
        count: Number of runs.

    Source:
        Besiroglu et al. 2024, arXiv:2404.10102, leave out five runs of Hoffmann et al.
    """

    count: int

    def kept(self, points: Points) -> NDArray[np.bool_]:
        """Return false for the runs with the highest loss."""
        return _without_first(-points.loss, self.count)


def _without_first(values: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    mask = np.ones(len(values), dtype=bool)
    mask[np.argsort(values, kind="stable")[:count]] = False
    return mask

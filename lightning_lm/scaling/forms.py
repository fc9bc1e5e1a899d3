"""Extrapolation test of the forms of scaling laws: each predicts the largest budgets from the smaller ones."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lightning_lm.errors import DataError
from lightning_lm.scaling.fits.fit import ScalingFit
from lightning_lm.scaling.fits.holdout import HeldOut, hold_out
from lightning_lm.scaling.fits.points import Points

__all__ = ["FormTest", "compare_forms"]


class FormTest(NamedTuple):
    """Predictions of a form for runs it had not seen."""

    method: str
    held: tuple[HeldOut, ...]

    @property
    def error(self) -> float:
        """Root mean square of the errors, as a share of the loss."""
        return float(np.sqrt(np.mean([one.error**2 for one in self.held])))

    @property
    def inside(self) -> int:
        """Number of the runs inside their intervals."""
        return sum(one.loss in one.predicted for one in self.held)


def compare_forms(
    points: Points, forms: Mapping[str, Callable[[Points], ScalingFit]], *, num_budgets: int = 1
) -> list[FormTest]:
    """Return the test of each form, the one with the smallest error first; forms that cannot be fitted are left out.

    Choose by it before you look at a budget that no fit has seen, or that budget is no test any more.

    Args:
        points: All runs.
        forms: Forms to compare, by name.
        num_budgets: Number of budgets to hold out, the largest first.
    """
    tests = []
    for name, fit in forms.items():
        try:
            tests.append(FormTest(name, tuple(hold_out(points, fit, num_budgets=num_budgets))))
        except DataError:
            continue
    return sorted(tests, key=lambda test: test.error)

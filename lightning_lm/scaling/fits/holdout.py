"""Extrapolation tests: a fit, or each form of a law, predicts the largest budgets from the smaller ones."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lightning_lm.errors import DataError
from lightning_lm.scaling.fits.fit import Estimate, ScalingFit
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN, Points

__all__ = ["FormTest", "HeldOut", "compare_forms", "hold_out"]


class HeldOut(NamedTuple):
    """One run that a fit had not seen."""

    parameters: float
    tokens: float
    loss: float
    predicted: Estimate

    @property
    def flops(self) -> float:
        """FLOPs of its training."""
        return FLOPS_PER_PARAMETER_TOKEN * self.parameters * self.tokens

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted.value / self.loss - 1


def hold_out(points: Points, fit: Callable[[Points], ScalingFit], *, num_budgets: int = 1) -> list[HeldOut]:
    """Fit without the largest budgets and predict their runs, with the scatter of single runs in the intervals.

    Args:
        points: All runs.
        fit: Fit to test, such as `fit_parametric`.
        num_budgets: Number of budgets to hold out, the largest first.

    Raises:
        DataError: If too few budgets are left.
    """
    groups = points.by_budget()
    if len(groups) <= num_budgets + 1:
        raise DataError(f"{len(groups)} budgets cannot spare {num_budgets}; at least two must be left to fit.")
    fitted = fit(points.where(np.concatenate(groups[:-num_budgets])))
    rows = np.concatenate(groups[-num_budgets:])
    return [
        HeldOut(size, tokens, loss, fitted.predict_run(size, tokens))
        for size, tokens, loss in zip(
            *(column[rows].tolist() for column in (points.parameters, points.tokens, points.loss)), strict=True
        )
    ]


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

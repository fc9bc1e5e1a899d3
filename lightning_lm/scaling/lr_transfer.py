"""Learning-rate transfer: the best learning rate at each width, and what it costs to keep that of a narrow model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lightning_lm.errors import DataError
from lightning_lm.scaling.fits.fit import Estimate
from lightning_lm.scaling.fits.points import FloatArray
from lightning_lm.scaling.ledger import RunRecord

__all__ = ["RateCurve", "TransferFit", "fit_transfer", "student_95", "transfer_of"]

_TWO_SIDED_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's 0.975 quantile for 1 to 10 degrees of freedom."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RateCurve:
    """The loss over the learning rate at one width.

    Args:
        width: Width of the models.
        rates: Learning rates, rising.
        losses: Loss of each; the mean over repeated runs.
    """

    width: float
    rates: FloatArray
    losses: FloatArray

    @property
    def at_edge(self) -> bool:
        """True if the lowest loss is at the end of the learning rates: the best one may lie beyond."""
        return int(np.argmin(self.losses)) in (0, len(self.rates) - 1)

    @property
    def best(self) -> float:
        """The learning rate at the minimum of the parabola in ``log lr`` through the lowest loss and its neighbours."""
        at = int(np.argmin(self.losses))
        if self.at_edge:
            return float(self.rates[at])
        curvature, slope, _ = self._parabola()
        return float(self.rates[at] * np.exp(-slope / (2 * curvature))) if curvature > 0 else float(self.rates[at])

    def loss_at(self, rates: ArrayLike) -> FloatArray:
        """Return losses at learning rates: on that parabola, beyond its three rates on straight lines in ``log lr``.

        Args:
            rates: Within the range that was trained; else the loss at its end is returned.
        """
        rate = np.asarray(rates, dtype=np.float64)
        line = np.interp(np.log(rate), np.log(self.rates), self.losses)
        if self.at_edge:
            return np.asarray(line)
        at = int(np.argmin(self.losses))
        inside = (rate >= self.rates[at - 1]) & (rate <= self.rates[at + 1])
        return np.where(inside, np.polyval(self._parabola(), np.log(rate / self.rates[at])), line)

    def _parabola(self) -> FloatArray:
        """Return the coefficients in ``log(rate / rate of the lowest loss)``, the highest power first."""
        at = int(np.argmin(self.losses))
        around = slice(at - 1, at + 2)
        return np.polyfit(np.log(self.rates[around] / self.rates[at]), self.losses[around], 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class TransferFit:
    """Drift of the best learning rate with the width: ``lr ~ width ^ drift``.

    Args:
        curves: One for each width, the narrowest first.
        drift: The power, with the interval that the scatter around it gives; 0 where learning rates transfer.
        kept: Loss of the widest models at the best learning rate of the narrowest, less that at their own. In the unit
            of the losses.
    """

    curves: tuple[RateCurve, ...]
    drift: Estimate
    kept: float

    @property
    def at_edge(self) -> tuple[float, ...]:
        """The widths at which the best learning rate may lie beyond those that were tried."""
        return tuple(curve.width for curve in self.curves if curve.at_edge)


def student_95(freedom: int) -> float:
    """Return Student's 0.975 quantile; that of 10 degrees of freedom for more.

    Args:
        freedom: Degrees of freedom, at least 1.
    """
    return _TWO_SIDED_95[min(freedom, len(_TWO_SIDED_95)) - 1]


def fit_transfer(widths: ArrayLike, rates: ArrayLike, losses: ArrayLike) -> TransferFit:
    """Fit the best learning rate at each width, and its power law in the width.

    Args:
        widths: Width of each run.
        rates: Learning rate of each run. Unitless.
        losses: Loss of each run, nats per token.

    Raises:
        DataError: If there are fewer than three widths, or fewer than three learning rates for one of them.

    Source:
        Yang et al. 2022 (Tensor Programs V), arXiv:2203.03466, figure 1.
    """
    width, rate, loss = (np.asarray(column, dtype=np.float64) for column in (widths, rates, losses))
    curves = tuple(_curve(one, rate[width == one], loss[width == one]) for one in np.unique(width).tolist())
    if len(curves) < 3:
        raise DataError(f"{len(curves)} widths say too little about transfer; train at least 3.")
    narrow, wide = curves[0], curves[-1]
    kept = float(wide.loss_at(narrow.best) - wide.loss_at(wide.best))
    return TransferFit(curves=curves, drift=_slope(curves), kept=kept)


def transfer_of(
    records: Sequence[RunRecord], *, width_key: str | None = None, rate_key: str | None = None
) -> TransferFit:
    """Fit the finished runs of a sweep over widths and learning rates.

    Args:
        records: Records of a ledger, of one parametrisation.
        width_key: Name of the width among their hyper-parameters; ``None`` for the one that ends in ``d_model``.
        rate_key: Name of the learning rate; ``None`` for the one that ends in ``lr``.

    Raises:
        DataError: If the names are not found, or there are too few runs.
    """
    finished = [record for record in records if record.finished]
    keys = sorted({key for record in finished for key in record.hyper_parameters})
    width, rate = width_key or _only(keys, "d_model"), rate_key or _only(keys, "lr")
    runs = [record for record in finished if {width, rate} <= record.hyper_parameters.keys()]
    if not runs:
        raise DataError(f"No run has both {width} and {rate} among its hyper-parameters, {', '.join(keys) or 'none'}.")
    settings = [record.hyper_parameters for record in runs]
    return fit_transfer([one[width] for one in settings], [one[rate] for one in settings], [run.loss for run in runs])


def _only(keys: Sequence[str], last: str) -> str:
    """Return the dotted name that ends in this word."""
    found = [key for key in keys if key.rpartition(".")[-1] == last]
    if len(found) != 1:
        if not keys:
            raise DataError("These runs have no hyper-parameters; learning rates are compared between runs of a sweep.")
        raise DataError(
            f"{len(found)} hyper-parameters of these runs are called {last!r}, and one is needed. Name one of "
            f"{', '.join(keys)}."
        )
    return found[0]


def _curve(width: float, rates: FloatArray, losses: FloatArray) -> RateCurve:
    tried = np.unique(rates)
    if len(tried) < 3:
        raise DataError(f"Width {width:g} was trained with {len(tried)} learning rates; a minimum needs at least 3.")
    means = np.array([losses[rates == one].mean() for one in tried])
    return RateCurve(width=width, rates=tried, losses=means)


def _slope(curves: Sequence[RateCurve]) -> Estimate:
    """Return the slope of ``log best`` over ``log width`` with Student's interval."""
    x, y = np.log([curve.width for curve in curves]), np.log([curve.best for curve in curves])
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    freedom = len(x) - 2
    scatter = y - y.mean() - slope * x
    error = np.sqrt(scatter @ scatter / freedom / (x @ x))
    half = float(student_95(freedom) * error)
    return Estimate(slope, slope - half, slope + half)

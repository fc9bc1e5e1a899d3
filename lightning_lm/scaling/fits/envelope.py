"""Approach 1: the lowest loss that any run had reached at each amount of compute."""

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import DataError
from lightning_lm.scaling.fits.diagnostics import Finding
from lightning_lm.scaling.fits.fit import ScalingFit
from lightning_lm.scaling.fits.frontier import FrontierLaw, frontier_through
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN, Curve, FloatArray, Points

__all__ = ["fit_envelope"]

_BUDGETS = 60


def fit_envelope(curves: list[Curve], *, num_bootstraps: int = 200, seed: int = 0) -> ScalingFit:
    """Fit power laws through the lower envelope of loss curves.

    Only curves of a schedule that had decayed at every point, or of a constant rate, can be compared; the middle of a
    cosine is too high and makes small models look better than they are.

    A run that is drawn twice adds nothing to an envelope and one that is not drawn leaves a hole, so a bootstrap of
    runs would be biased: intervals are normal, with the covariance of leaving out one run after the other.

    Args:
        curves: At least three runs of different sizes.
        num_bootstraps: Draws from that normal distribution.
        seed: Seed of the resampling.

    Raises:
        DataError: If fewer than three sizes are ever the best.

    Source:
        Hoffmann et al. 2022, arXiv:2203.15556, section 3.1; the jackknife: Efron 1982, section 3.
    """
    budgets, table = _table(curves)
    sizes = np.log([curve.parameters for curve in curves])
    best = np.argmin(table, axis=0)
    if len(np.unique(sizes[best])) < 3:
        raise DataError(
            f"Of {len(curves)} runs only {len(np.unique(best))} are ever the best, which is no frontier; it needs "
            "three sizes. Add curves of other sizes, so that they cross."
        )
    points = Points.of(
        np.exp(sizes[best]), budgets / FLOPS_PER_PARAMETER_TOKEN / np.exp(sizes[best]), np.exp(table.min(0))
    )
    law = FrontierLaw(size_centre=float(np.exp(sizes.mean())), token_centre=float(np.exp(np.log(points.tokens).mean())))
    everything = np.arange(len(curves))
    thetas = _frontiers(law, budgets, table, sizes, [everything, *(np.delete(everything, i) for i in everything)])
    fitted = law.log_loss(thetas[:1], points.parameters, points.tokens)[0]
    return ScalingFit(
        law=law,
        theta=thetas[0],
        samples=_normal(thetas, num_bootstraps, seed),
        points=points,
        residuals=fitted - np.log(points.loss),
        findings=_edges(sizes, best),
        method="envelope",
    )


def _table(curves: list[Curve]) -> tuple[FloatArray, FloatArray]:
    """Return budgets, and the logarithm of each run's loss there, [runs, budgets]; infinite where it did not run."""
    compute = [FLOPS_PER_PARAMETER_TOKEN * curve.parameters * curve.tokens for curve in curves]
    if len(curves) < 3:
        raise DataError(f"{len(curves)} curves have no envelope; give at least three, of different sizes.")
    low, high = max(flops[0] for flops in compute), min(flops[-1] for flops in compute)
    low, high = (low, high) if low < high / 4 else (min(f[0] for f in compute), max(f[-1] for f in compute))
    budgets = np.geomspace(low, high * (1 - 1e-9), _BUDGETS)
    rows = [
        np.interp(np.log(budgets), np.log(flops), np.log(curve.loss), left=np.inf, right=np.inf)
        for curve, flops in zip(curves, compute, strict=True)
    ]
    table = np.stack(rows)
    covered = np.isfinite(table).any(0)
    return budgets[covered], table[:, covered]


def _normal(thetas: FloatArray, number: int, seed: int) -> FloatArray:
    """Draw around the first row with the jackknife's covariance of the others, each without one run."""
    away = thetas[1:] - thetas[1:].mean(0)
    scale = np.sqrt((len(away) - 1) / max(1, len(away)))
    return np.asarray(thetas[0] + scale * np.random.default_rng(seed).standard_normal((number, len(away))) @ away)


def _frontiers(
    law: FrontierLaw, budgets: FloatArray, table: FloatArray, sizes: FloatArray, draws: list[NDArray[np.intp]]
) -> FloatArray:
    centre = np.log(FLOPS_PER_PARAMETER_TOKEN * law.size_centre * law.token_centre)
    found, lowest = [], []
    for chosen in draws:
        part = table[chosen]
        winners = sizes[chosen][np.argmin(part, axis=0)]
        if np.isfinite(part.min(0)).all() and len(np.unique(winners)) > 1:
            found.append(winners - np.log(law.size_centre))
            lowest.append(np.exp(part.min(0)))
    flat = np.zeros(len(found))
    return frontier_through(np.log(budgets) - centre, np.stack(found), np.stack(lowest), flat)


def _edges(sizes: FloatArray, best: NDArray[np.intp]) -> tuple[Finding, ...]:
    shares = {"smallest": np.mean(sizes[best] == sizes.min()), "largest": np.mean(sizes[best] == sizes.max())}
    return tuple(
        Finding("edge", f"the {which} model is the best at {share:.0%} of the budgets: the sweep ends too soon there.")
        for which, share in shares.items()
        if share > 0.2
    )

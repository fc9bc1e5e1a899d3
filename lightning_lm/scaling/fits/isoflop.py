"""Approach 2: a parabola through the runs of each budget; its minimum is the optimal size."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import DataError
from lightning_lm.parts import Limit, Part
from lightning_lm.scaling.fits.diagnostics import Finding, examine
from lightning_lm.scaling.fits.fit import ScalingFit, for_few_runs
from lightning_lm.scaling.fits.frontier import FrontierLaw, frontier_through
from lightning_lm.scaling.fits.parametric import Estimator, fit_parametric
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN, FloatArray, Points

__all__ = ["IsoFlop", "Parabola", "fit_isoflop", "parabolas"]

_NOTABLE_BIAS = 0.02


@dataclass(frozen=True, kw_only=True)
class Parabola:
    """The runs of one budget and the parabola through them: ``loss = loss_min + c (log N - log N_opt)^2``.

    Args:
        flops: The budget.
        rows: Indices of its points.
        log_size: Logarithm of the size at the minimum.
        loss: At the minimum.
        curvature: ``c``.
    """

    flops: float
    rows: NDArray[np.intp]
    log_size: float
    loss: float
    curvature: float

    @property
    def has_minimum(self) -> bool:
        """True if it has a minimum above zero; that of scattered losses may not."""
        return self.curvature > 0 and self.loss > 0

    def at(self, parameters: FloatArray) -> FloatArray:
        """Return the losses of the parabola.

        Args:
            parameters: Sizes.
        """
        return np.asarray(self.loss + self.curvature * (np.log(parameters) - self.log_size) ** 2)


@dataclass(frozen=True, kw_only=True)
class IsoFlop(
    Part,
    limits={"tolerance": Limit.NON_NEGATIVE, "num_bootstraps": Limit.NON_NEGATIVE, "seed": Limit.NON_NEGATIVE},
):
    """Settings of the parabolas.

    Args:
        tolerance: Relative difference of FLOPs up to which runs belong to one budget.
        num_bootstraps: Number of resamplings of the residuals.
        seed: Seed of the resampling.
    """

    tolerance: float = 0.1
    num_bootstraps: int = 400
    seed: int = 0


def parabolas(points: Points, tolerance: float = 0.1) -> list[Parabola]:
    """Return the parabola of each budget with at least three sizes, the smallest budget first.

    Args:
        points: The runs.
        tolerance: Relative difference of FLOPs up to which runs belong to one budget.
    """
    found = []
    for rows in points.by_budget(tolerance):
        sizes = np.log(points.parameters[rows])
        if len(np.unique(sizes)) >= 3:
            coefficients = _solver(sizes) @ points.loss[rows]
            log_size, loss, curvature = (float(value[0]) for value in _minimum(coefficients[None], sizes))
            flops = float(np.exp(np.log(points.flops[rows]).mean()))
            found.append(Parabola(flops=flops, rows=rows, log_size=log_size, loss=loss, curvature=curvature))
    return found


def fit_isoflop(points: Points, settings: IsoFlop = IsoFlop()) -> ScalingFit:
    """Fit power laws through the minima of parabolas in ``log N``, one for each budget.

    Intervals come from resampled residuals of the parabolas, widened for the few runs of a sweep.

    Args:
        points: At least three budgets with at least three sizes each.
        settings: Width of a budget; bootstraps.

    Raises:
        DataError: If fewer than three budgets have a minimum above zero.

    Source:
        Hoffmann et al. 2022, arXiv:2203.15556, section 3.2.
    """
    curves = [curve for curve in parabolas(points, settings.tolerance) if curve.has_minimum]
    if len(curves) < 3:
        raise DataError(
            f"Only {len(curves)} budgets have at least three sizes and a minimum above zero; at least 3 are needed. "
            "Train more sizes around the best one of each budget, each for the tokens that its budget allows."
        )
    rows = np.concatenate([curve.rows for curve in curves])
    law = FrontierLaw(size_centre=_middle(points.parameters[rows]), token_centre=_middle(points.tokens[rows]))
    random = np.random.default_rng(settings.seed)
    thetas = _frontiers(points, curves, law, _redrawn(points, curves, random, settings.num_bootstraps))
    used = points.where(rows)
    fitted = law.log_loss(thetas[:1], used.parameters, used.tokens)[0]
    return ScalingFit(
        law=law,
        theta=thetas[0],
        samples=thetas[1:][np.isfinite(thetas[1:]).all(1)],
        points=used,
        residuals=fitted - np.log(used.loss),
        findings=(*examine(used), *_edges(points, curves), *_bias(used, settings)),
        method="isoFLOP",
    )


def _solver(sizes: FloatArray) -> FloatArray:
    """Return the matrix that makes coefficients of losses: constant, slope, curvature around the mean size."""
    centred = sizes - sizes.mean()
    return np.linalg.pinv(np.stack([np.ones_like(centred), centred, centred**2], axis=-1))


def _minimum(coefficients: FloatArray, sizes: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    constant, slope, curvature = coefficients.T
    with np.errstate(divide="ignore", invalid="ignore"):
        away = np.where(curvature > 0, -slope / (2 * curvature), np.nan)
    return away + sizes.mean(), constant + slope * away / 2, curvature


def _redrawn(points: Points, curves: list[Parabola], random: np.random.Generator, number: int) -> list[FloatArray]:
    """Return losses of each budget, [1 + number, runs]: as measured, then with residuals drawn from all budgets."""
    fitted = [curve.at(points.parameters[curve.rows]) for curve in curves]
    relative = np.concatenate([points.loss[c.rows] / f - 1 for c, f in zip(curves, fitted, strict=True)])
    widened = relative * for_few_runs(len(relative), 3 * len(curves))
    return [
        np.concatenate([points.loss[c.rows][None], f * (1 + random.choice(widened, (number, len(f))))])
        for c, f in zip(curves, fitted, strict=True)
    ]


def _frontiers(points: Points, curves: list[Parabola], law: FrontierLaw, losses: list[FloatArray]) -> FloatArray:
    minima = []
    for curve, values in zip(curves, losses, strict=True):
        sizes = np.log(points.parameters[curve.rows])
        minima.append(_minimum(values @ _solver(sizes).T, sizes))
    log_sizes, lowest, curvatures = (np.stack(column, axis=-1) for column in zip(*minima, strict=True))
    fine = np.isfinite(log_sizes).all(1) & (lowest > 0).all(1)
    centre = np.log(FLOPS_PER_PARAMETER_TOKEN * law.size_centre * law.token_centre)
    log_flops = np.log([curve.flops for curve in curves]) - centre
    relative = (curvatures[fine] / lowest[fine]).mean(1)
    return frontier_through(log_flops, log_sizes[fine] - np.log(law.size_centre), lowest[fine], relative)


def _edges(points: Points, curves: list[Parabola]) -> list[Finding]:
    findings = []
    for curve in curves:
        sizes = points.parameters[curve.rows]
        best = sizes[np.argmin(points.loss[curve.rows])]
        side = "smaller" if best == sizes.min() else "larger" if best == sizes.max() else None
        if side is not None:
            message = f"at {curve.flops:.3g} FLOPs the best size, {best:.3g}, is at the sweep's edge: add {side} ones."
            findings.append(Finding("edge", message))
    return findings


def _bias(points: Points, settings: IsoFlop) -> list[Finding]:
    """Say by how much parabolas would miss the optimum if the loss were exactly the parametric law of these runs."""
    if len(points) < 12 or not settings.num_bootstraps:
        return []
    exact = fit_parametric(points, Estimator(num_bootstraps=0, delta=1.0))
    clean = Points.of(points.parameters, points.tokens, np.exp(np.log(points.loss) + exact.residuals))
    budget = 10 * float(points.flops.max())
    truth = exact.optimal(budget).parameters.value
    try:
        found = fit_isoflop(clean, IsoFlop(tolerance=settings.tolerance, num_bootstraps=0)).optimal(budget)
    except DataError:
        return []
    bias = found.parameters.value / truth - 1
    if not np.isfinite(bias) or abs(bias) < _NOTABLE_BIAS:
        return []
    message = (
        f"the loss is no parabola: at ten times the largest budget the minima would miss the optimal size of the "
        f"parametric law by {bias:+.0%} even without noise. Trust fit_parametric there, or train sizes nearer the best."
    )
    return [Finding("bias", message)]


def _middle(values: FloatArray) -> float:
    return float(np.exp(np.log(values).mean()))

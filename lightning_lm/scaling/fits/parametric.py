"""Laws fitted to the end points of runs: Chinchilla's approach 3, Kaplan's form, and repeated data."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from lightning_lm.errors import DataError
from lightning_lm.parts import Limit, Part
from lightning_lm.scaling.fits.diagnostics import KeepAll, Outliers, examine
from lightning_lm.scaling.fits.fit import ScalingFit, for_few_runs
from lightning_lm.scaling.fits.laws import ChinchillaLaw, DataConstrainedLaw, GeneralLaw, KaplanLaw, Law
from lightning_lm.scaling.fits.points import FloatArray, Points
from lightning_lm.scaling.fits.solver import EXPONENTS, Problem, minimise, newton_step, non_negative, start_of_powers

__all__ = ["Estimator", "fit_data_constrained", "fit_general", "fit_kaplan", "fit_parametric", "problem_of"]

_BATCH = 256
"""Bootstraps that are solved at once: few enough to stay in a core's cache."""
_MANY = 1000
"""Runs from which one step of Newton's method is near enough to each bootstrap."""
_RUNS_OF_A_START = 500
"""Runs that choose a starting point; all of them are fitted from there."""
_HALF_LIVES = np.geomspace(1.0, 100.0, 7)
_Start = Callable[[Law, Points], FloatArray]
"""From a law and points to [starts, parameters]."""


@dataclass(frozen=True, kw_only=True)
class Estimator(
    Part, limits={"delta": Limit.POSITIVE, "num_bootstraps": Limit.NON_NEGATIVE, "seed": Limit.NON_NEGATIVE}
):
    """Fit of a law, and its intervals. The same for the point estimate and every bootstrap.

    Args:
        delta: Log-residuals beyond it count linearly (Huber).
        outliers: Rule for the runs to leave out.
        num_bootstraps: Number of resamplings of the runs.
        seed: Seed of the resampling.

    Source:
        Hoffmann et al. 2022, arXiv:2203.15556, equation 3, with their ``delta``.
    """

    delta: float = 1e-3
    outliers: Outliers = KeepAll()
    num_bootstraps: int = 400
    seed: int = 0


def fit_parametric(points: Points, estimator: Estimator = Estimator()) -> ScalingFit:
    """Fit ``E + A / N^alpha + B / D^beta``.

    Args:
        points: At least six runs of several sizes and lengths.
        estimator: Loss, outliers, bootstraps.

    Raises:
        DataError: If the runs are too few, or all of one size or one length.

    Example:
        >>> N, D = np.meshgrid(np.geomspace(1e6, 1e9, 8), np.geomspace(1e8, 1e11, 8))
        >>> loss = 1.69 + 406.4 / N**0.34 + 410.7 / D**0.28
        >>> fit = fit_parametric(Points.of(N.ravel(), D.ravel(), loss.ravel()), Estimator(num_bootstraps=0))
        >>> round(fit.values["alpha"], 4)
        0.34

    Source:
        Hoffmann et al. 2022, arXiv:2203.15556, section 3.3.
    """
    return _fit(ChinchillaLaw(), points, estimator, _chinchilla_start)


def fit_kaplan(points: Points, estimator: Estimator = Estimator()) -> ScalingFit:
    """Fit ``((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D``, for comparison: it has no floor.

    Args:
        points: At least five runs of several sizes and lengths.
        estimator: Loss, outliers, bootstraps.

    Raises:
        DataError: If the runs are too few, or all of one size or one length.

    Source:
        Kaplan et al. 2020, arXiv:2001.08361, equation 1.5.
    """
    return _fit(KaplanLaw(), points, estimator, _kaplan_start, method="kaplan")


def fit_general(points: Points, estimator: Estimator = Estimator(delta=1e-2)) -> ScalingFit:
    """Fit ``E + (A / N^alpha + B / D^beta)^gamma``, which holds Chinchilla's and Kaplan's forms.

    It does not choose between a floor and none where the runs cannot tell, so its intervals are wide there.

    Args:
        points: At least seven runs of several sizes and lengths, better 25.
        estimator: Loss, outliers, bootstraps. Its ``delta`` is the scatter of small runs: beyond Hoffmann's 1e-3 a fit
            goes through as many runs as it has parameters and calls the others outliers.

    Raises:
        DataError: If the runs are too few, or all of one size or one length.

    Source:
        Busbridge et al. 2025, arXiv:2502.08606, equation 1.
    """
    return _fit(GeneralLaw(), points, estimator, _general_start, method="general")


def fit_data_constrained(points: Points, estimator: Estimator = Estimator()) -> ScalingFit:
    """Fit Chinchilla's law with two half-lives: of repeated tokens, and of parameters in excess of the unique tokens.

    Args:
        points: At least eight runs with ``unique_tokens``, some of which saw their tokens more than once.
        estimator: Loss, outliers, bootstraps.

    Raises:
        DataError: If unique tokens are missing, the runs are too few, or none repeats its data.

    Source:
        Muennighoff et al. 2023, arXiv:2305.16264, section 3.1.
    """
    unique = DataConstrainedLaw().columns(points)["unique_tokens"]
    if not np.any(points.tokens > 1.5 * unique):
        raise DataError("No run repeats its data (tokens > 1.5 unique_tokens); fit_parametric is enough for these.")
    return _fit(DataConstrainedLaw(), points, estimator, _data_constrained_start)


def problem_of(law: Law, points: Points, delta: float) -> Problem:
    """Return the residuals whose Huber losses a fit makes small: logarithms of the fitted over the measured loss.

    Args:
        law: The form.
        points: The runs.
        delta: Threshold of Huber's loss.
    """
    columns, target = law.columns(points), np.log(points.loss)
    measured = type(law).slopes is Law.slopes
    return Problem(
        residuals=lambda theta: law.log_loss(theta, **columns) - target,
        jacobian=None if measured else partial(law.slopes, **columns),  # type: ignore[arg-type]
        delta=delta,
    )


def _fit(law: Law, points: Points, estimator: Estimator, start: _Start, *, method: str = "parametric") -> ScalingFit:
    kept = estimator.outliers.kept(points)
    used = points.where(kept)
    law.columns(used)
    _check(used, len(law.names))
    law = dataclasses.replace(law, size_centre=_middle(used.parameters), token_centre=_middle(used.tokens))
    problem = problem_of(law, used, estimator.delta)
    starts = start(law, used.where(np.arange(0, len(used), max(1, len(used) // _RUNS_OF_A_START))))
    weights = used.weights
    thetas, costs = minimise(problem, starts, np.broadcast_to(weights, (len(starts), len(used))))
    theta = thetas[np.argmin(costs)]
    return ScalingFit(
        law=law,
        theta=theta,
        samples=_bootstrap(problem, theta, weights, estimator),
        points=used,
        dropped=None if kept.all() else points.where(~kept),
        residuals=problem.residuals(theta[None])[0],
        findings=examine(used),
        method=method,
        widening=for_few_runs(len(used), len(law.names)),
    )


def _bootstrap(problem: Problem, theta: FloatArray, weights: FloatArray, estimator: Estimator) -> FloatArray:
    """Fit runs that are drawn again with replacement: a run that is drawn twice counts twice."""
    random, number = np.random.default_rng(estimator.seed), len(weights)
    samples = [np.empty((0, len(theta)))]
    batch = _BATCH if number < _MANY else _BATCH // 8
    for begin in range(0, estimator.num_bootstraps, batch):
        size = min(batch, estimator.num_bootstraps - begin)
        if number >= _MANY:
            counts = [np.bincount(random.integers(number, size=number), minlength=number) for _ in range(size)]
            samples.append(newton_step(problem, theta, np.stack(counts) * weights))
            continue
        drawn = random.multinomial(number, np.full(number, 1 / number), size) * weights
        samples.append(minimise(problem, np.tile(theta, (size, 1)), drawn, tolerance=1e-6)[0])
    return np.concatenate(samples)


def _chinchilla_start(law: Law, points: Points) -> FloatArray:
    size, data = points.parameters / law.size_centre, points.tokens / law.token_centre
    return start_of_powers(size, data, points.loss, points.weights)[None]


def _kaplan_start(law: Law, points: Points) -> FloatArray:
    size, data = points.parameters / law.size_centre, points.tokens / law.token_centre
    exponent, ratio = (grid.ravel() for grid in np.meshgrid(EXPONENTS, np.geomspace(0.2, 5.0, 14)))
    target = points.loss ** (1 / exponent[:, None])  # the law is linear in these
    columns = np.stack([size ** -ratio[:, None], np.broadcast_to(1 / data, target.shape)], axis=-1)
    coefficients, _ = non_negative(columns / target[..., None], np.ones(len(points)), points.weights)
    fine = (coefficients > 0).all(1)
    a, b = np.log(coefficients[fine]).T
    starts = np.stack([np.log(exponent[fine]), np.log(ratio[fine]), a, b], axis=-1)
    residuals = law.log_loss(starts, points.parameters, points.tokens) - np.log(points.loss)
    return starts[np.argsort((points.weights * residuals**2).sum(1))[:4]]


def _general_start(law: Law, points: Points) -> FloatArray:
    """Return Chinchilla's start, and Kaplan's with floors that are shares of the lowest loss."""
    kaplan = _kaplan_start(KaplanLaw(size_centre=law.size_centre, token_centre=law.token_centre), points)[:1]
    starts = [np.append(_chinchilla_start(law, points)[0], 0.0)]
    for log_gamma, log_ratio, a, b in kaplan:
        floors = np.log(np.array([1e-3, 0.3, 0.6]) * points.loss.min())
        starts += [np.array([floor, a, np.exp(log_ratio), b, 1.0, log_gamma]) for floor in floors]
    return np.stack(starts)


def _data_constrained_start(law: Law, points: Points) -> FloatArray:
    assert points.unique_tokens is not None
    once = points.where(points.tokens <= 1.5 * points.unique_tokens)
    base = once if len(once) > 5 and len(np.unique(once.parameters)) > 1 else points
    powers = _chinchilla_start(law, base)[0]
    grid = [np.concatenate([powers, np.log([n, d])]) for n in _HALF_LIVES for d in _HALF_LIVES]
    problem = problem_of(law, points, 1.0)
    costs = (points.weights * problem.residuals(np.array(grid)) ** 2).sum(1)
    return np.array(grid)[np.argsort(costs)[:4]]


def _middle(values: FloatArray) -> float:
    return float(np.exp(np.log(values).mean()))


def _check(points: Points, number: int) -> None:
    if len(points) <= number:
        raise DataError(f"{len(points)} runs cannot fix {number} parameters; give at least {number + 1}, better 20.")
    for name in ("parameters", "tokens"):
        if len(np.unique(getattr(points, name))) < 2:
            raise DataError(f"All runs have the same {name}, so its exponent cannot be told; vary it by ten and more.")

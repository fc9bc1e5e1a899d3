"""Profile intervals: how far a parameter can go before the best of the others no longer make up for it."""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import ConfigurationError
from lightning_lm.scaling.fits.fit import Estimate, ScalingFit
from lightning_lm.scaling.fits.parametric import Estimator, problem_of
from lightning_lm.scaling.fits.points import FloatArray
from lightning_lm.scaling.fits.solver import minimise

__all__ = ["profile_interval"]

_POINTS = 17
_ROUNDS = 3
_FIRST_STEP, _LAST_STEP = 1e-6, 30.0
"""Steps of a logarithm or an exponent."""


def profile_interval(
    fit: ScalingFit, name: str, *, estimator: Estimator = Estimator(), level: float = 0.95
) -> Estimate:
    """Return the interval of a parameter by its profile: the same loss as the fit, no resampling.

    Only parameters that are inner ones up to a transformation have a profile: E, alpha, beta.

    Args:
        fit: Result of `fit_parametric` or `fit_kaplan`.
        name: Name of a parameter in ``fit.values``.
        estimator: The one of the fit.
        level: Confidence level of the interval, between 0 and 1.

    Raises:
        ConfigurationError: If that parameter mixes several inner ones.

    Source:
        The deviance of a robust estimate: Ronchetti 1982; Hampel et al. 1986, section 7.2 (the tau test).
    """
    index = _inner_index(fit, name)
    ends = [_end(fit, index, side, estimator, level) for side in (-1.0, 1.0)]
    theta = np.tile(fit.theta, (2, 1))
    theta[:, index] = ends
    values = fit.law.published(theta)[:, fit.law.names.index(name)]
    return Estimate(fit.values[name], float(values.min()), float(values.max()))


def _end(fit: ScalingFit, index: int, side: float, estimator: Estimator, level: float) -> float:
    """Return where the deviance of a profile crosses its limit, on one side."""
    problem = problem_of(fit.law, fit.points, estimator.delta)
    weights = fit.points.weights / fit.points.weights.mean()
    free = np.arange(len(fit.theta)) != index
    cost = minimise(problem, fit.theta[None], weights[None])[1][0]
    limit = NormalDist().inv_cdf((1 + level) / 2) ** 2 * _scale(fit.residuals, weights, estimator.delta, len(fit.theta))

    def outside(away: FloatArray) -> NDArray[np.bool_]:
        starts = np.tile(fit.theta, (len(away), 1))
        starts[:, index] += side * away
        costs = minimise(problem, starts, np.tile(weights, (len(away), 1)), free=free)[1]
        return np.asarray(costs - cost > limit)

    near, far = 0.0, _FIRST_STEP
    while far < _LAST_STEP and not outside(np.array([far]))[0]:
        near, far = far, 2 * far
    for _ in range(_ROUNDS):
        grid = np.linspace(near, far, _POINTS)
        beyond = outside(grid)
        first = max(1, int(np.argmax(beyond))) if beyond.any() else _POINTS - 1
        near, far = grid[first - 1], grid[first]
    return float(fit.theta[index] + side * (near + far) / 2)


def _inner_index(fit: ScalingFit, name: str) -> int:
    if name not in fit.law.names:
        raise ConfigurationError(f"{type(fit.law).__name__} has no {name!r}; it has {', '.join(fit.law.names)}.")
    outer = fit.law.names.index(name)
    moved = fit.theta + np.eye(len(fit.theta)) * 1e-3
    changes = np.abs(fit.law.published(moved)[:, outer] / fit.values[name] - 1) > 1e-9
    if changes.sum() != 1:
        raise ConfigurationError(f"{name} mixes several inner parameters; use fit.intervals(), the bootstrap's.")
    return int(np.argmax(changes))


def _scale(residuals: FloatArray, weights: FloatArray, delta: float, number: int) -> float:
    """Return half the mean squared influence over the mean curvature: what a unit of chi squared costs."""
    size = np.abs(residuals)
    window = max(delta, 0.5 * float(np.median(size)))  # few residuals lie within a small delta: look a little further
    rest = max(1, len(size) - number)
    inside = float((weights * (size < window)).sum()) - number  # a fit goes through as many points as it has parameters
    curvature = max(inside, 1.0) / rest * delta / window
    influence = float((weights**2 * np.minimum(size, delta) ** 2).sum() / rest)
    return 0.5 * influence / curvature

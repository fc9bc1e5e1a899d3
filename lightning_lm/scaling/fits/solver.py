"""Robust least squares for many small problems at once: the point estimate, its bootstraps and its profiles.

All go through the same code, a point estimate as a batch of one, so an interval can never belong to another estimator.

Starting points come by variable projection: with the exponents on a grid, the rest of a law is linear and has a
closed-form optimum. One point that is already near replaces thousands (Golub and Pereyra 1973).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_lm.scaling.fits.points import FloatArray

__all__ = ["EXPONENTS", "Problem", "huber", "minimise", "newton_step", "non_negative", "start_of_powers"]

_LARGEST_STEP = 2.0
_LARGEST_DAMPING = 1e7


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Residuals of a batch of parameter vectors.

    Args:
        residuals: From [batch, parameters] to [batch, points].
        jacobian: From [batch, parameters] to [batch, points, parameters]; ``None`` for central differences.
        delta: Threshold of Huber's loss between squares and absolute values, in units of a residual.
    """

    residuals: Callable[[FloatArray], FloatArray]
    jacobian: Callable[[FloatArray], FloatArray] | None = None
    delta: float = 1e-3

    def slopes(self, theta: FloatArray) -> FloatArray:
        """Return the derivatives of the residuals, [batch, points, parameters].

        Args:
            theta: [batch, parameters].
        """
        return _differences(self.residuals, theta) if self.jacobian is None else self.jacobian(theta)


def huber(residuals: FloatArray, delta: float) -> FloatArray:
    """Return half the square of a residual, growing only linearly beyond ``delta``.

    Args:
        residuals: Residuals of any shape.
        delta: Threshold between squares and absolute values.

    Source:
        Huber 1964, "Robust estimation of a location parameter", section 1.
    """
    size = np.abs(residuals)
    return np.asarray(np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)))


def minimise(
    problem: Problem,
    theta: FloatArray,
    weights: FloatArray,
    *,
    free: NDArray[np.bool_] | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 200,
) -> tuple[FloatArray, FloatArray]:
    """Return the parameters that minimise the weighted sum of Huber losses, and that sum, for each of a batch.

    Newton's method, damped towards iteratively reweighted least squares (which cannot go uphill) and then towards the
    gradient, in the manner of Levenberg and Marquardt. What has converged leaves the batch. Weights may be scaled by
    any factor.

    Args:
        problem: Objective to minimise.
        theta: Starting points, [batch, parameters].
        weights: Weight of each point, [batch, points].
        free: Mask of the parameters that may move, [parameters]; ``None`` for all.
        tolerance: A step this small against its parameter ends the search.
        max_iterations: The most steps.
    """
    theta = theta.copy()
    free = np.ones(theta.shape[1], dtype=bool) if free is None else free
    weights = weights / weights.mean(axis=1, keepdims=True)
    cost = np.empty(len(theta))
    active = np.arange(len(theta))
    residuals, slopes = problem.residuals(theta), problem.slopes(theta)[..., free]
    cost[:] = (weights * huber(residuals, problem.delta)).sum(1)
    damping = np.full(len(theta), 1e-2)
    for _ in range(max_iterations):
        step = _step(slopes, residuals, weights[active], problem.delta, damping)
        trial = theta[active]
        trial[:, free] += step
        tried = problem.residuals(trial)
        tried_cost = (weights[active] * huber(tried, problem.delta)).sum(1)
        better = tried_cost < cost[active]
        theta[active[better]], cost[active[better]] = trial[better], tried_cost[better]
        residuals[better] = tried[better]
        if better.any():
            slopes[better] = problem.slopes(trial[better])[..., free]
        damping = np.where(better, np.maximum(damping / 6, 1e-9), damping * 4)
        small = np.abs(step).max(1) <= tolerance * (1 + np.abs(trial[:, free]).max(1))
        left = ~((small & better) | (damping > _LARGEST_DAMPING) | (small & (damping < 1)))
        active, damping, residuals, slopes = active[left], damping[left], residuals[left], slopes[left]
        if not len(active):
            break
    return theta, cost


def newton_step(problem: Problem, theta: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the minimum under each row of weights after one step of Newton's method from a minimum under equal ones.

    For many points it lies as near as the repetitions can tell, and all of them together cost a few matrix products.

    Args:
        problem: Objective that `theta` minimises.
        theta: [parameters].
        weights: Weight of each point, [batch, points].

    Source:
        Davidson and MacKinnon 1999, "Bootstrap testing in nonlinear models", section 3, one step from the estimate.
    """
    residuals, slopes = problem.residuals(theta[None])[0], problem.slopes(theta[None])[0]
    inside = np.abs(residuals) <= problem.delta
    scores = np.clip(residuals, -problem.delta, problem.delta)[:, None] * slopes
    products = (slopes[inside, :, None] * slopes[inside, None, :]).reshape(-1, len(theta) ** 2)
    hessian = (weights[:, inside] @ products).reshape(-1, len(theta), len(theta))
    floor = 1e-14 * np.trace(hessian, axis1=1, axis2=2) + 1e-300
    hessian += floor[:, None, None] * np.eye(len(theta))
    step: FloatArray = np.linalg.solve(hessian, (weights @ scores)[..., None])[..., 0]
    return theta - np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)


def _step(
    slopes: FloatArray, residuals: FloatArray, weights: FloatArray, delta: float, damping: FloatArray
) -> FloatArray:
    size = np.abs(residuals)
    outside = size > delta
    linear = np.where(outside, delta / np.maximum(size, delta), 1.0) * weights
    share = np.minimum(1.0, damping)[:, None]
    curvature = np.where(outside, share * linear, weights)
    transposed = slopes.transpose(0, 2, 1)
    hessian = (transposed * curvature[:, None, :]) @ slopes
    scale = np.einsum("bn,bnp->bp", linear, slopes**2)
    gradient = (transposed @ (linear * residuals)[..., None])[..., 0]
    number = slopes.shape[2]
    floor = 1e-14 * scale.max(1, keepdims=True, initial=0.0) + 1e-300
    hessian[:, range(number), range(number)] += damping[:, None] * scale + floor
    return np.clip(-np.linalg.solve(hessian, gradient[..., None])[..., 0], -_LARGEST_STEP, _LARGEST_STEP)


def _differences(function: Callable[[FloatArray], FloatArray], theta: FloatArray) -> FloatArray:
    columns = []
    for index in range(theta.shape[1]):
        width = 1e-6 * (1 + np.abs(theta[:, index]))
        up, down = theta.copy(), theta.copy()
        up[:, index] += width
        down[:, index] -= width
        columns.append((function(up) - function(down)) / (2 * width[:, None]))
    return np.stack(columns, axis=-1)


EXPONENTS = np.geomspace(0.03, 1.5, 14)
"""Exponents that are tried."""
_TINY = 1e-8


def non_negative(columns: FloatArray, target: FloatArray, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return non-negative coefficients of few columns, and the sum of squares they leave, for a batch.

    Every choice of columns is solved; the best that is not negative is the answer, as there are few.

    Args:
        columns: [batch, points, columns].
        target: [batch, points], or [points].
        weights: [points].
    """
    target = np.broadcast_to(target, columns.shape[:2])
    batch, _, number = columns.shape
    best, cost = np.zeros((batch, number)), (weights * target**2).sum(1)
    weighted = columns * weights[:, None]
    gram, moment = weighted.transpose(0, 2, 1) @ columns, (weighted * target[..., None]).sum(1)
    for size in range(1, number + 1):
        for chosen in itertools.combinations(range(number), size):
            index = np.array(chosen)
            inner = gram[:, index[:, None], index]
            ridge = 1e-13 * np.einsum("bii->b", inner)[:, None, None] * np.eye(size)
            solved = np.linalg.solve(inner + ridge, moment[:, index, None])[..., 0]
            left = target - (columns[:, :, index] * solved[:, None, :]).sum(-1)
            found = (weights * left**2).sum(1)
            better = (solved >= 0).all(1) & (found < cost)
            cost = np.where(better, found, cost)
            best[better] = 0.0
            best[np.ix_(better, index)] = solved[better]
    return best, cost


def start_of_powers(size: FloatArray, data: FloatArray, loss: FloatArray, weights: FloatArray) -> FloatArray:
    """Return logarithms and exponents of ``E + A / size^alpha + B / data^beta``: e, a, alpha, b, beta.

    Args:
        size: Around one.
        data: Around one.
        loss: Nats per token.
        weights: Weights of the points.
    """
    alpha, beta = (grid.ravel() for grid in np.meshgrid(EXPONENTS, EXPONENTS))
    columns = np.stack([np.ones((len(alpha), len(loss))), size ** -alpha[:, None], data ** -beta[:, None]], axis=-1)
    coefficients, cost = non_negative(columns / loss[:, None], np.ones(len(loss)), weights)  # relative residuals
    best = int(np.argmin(cost))
    e, a, b = np.log(np.maximum(coefficients[best], _TINY))
    return np.array([e, a, alpha[best], b, beta[best]])

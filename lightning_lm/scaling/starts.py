"""Starting points: with the exponents on a grid, the rest of a law is linear and has a closed-form optimum.

Variable projection replaces thousands of starting points by one that is already near (Golub and Pereyra 1973).
"""

import itertools

import numpy as np

from lightning_lm.scaling.fits.points import FloatArray

__all__ = ["EXPONENTS", "non_negative", "start_of_powers"]

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

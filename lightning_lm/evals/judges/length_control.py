"""Length-controlled win rate: the win rate that a logistic regression expects where both answers are equally long.

Simplified against the paper: the difficulty of instructions, which it estimates from many models' results, is left out,
so the regression has an intercept and the length. Preferences may be fractions; a tie is half a win.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightning_lm.errors import DataError

__all__ = ["LengthControl", "length_controlled_win_rate"]

_ITERATIONS = 100
_TOLERANCE = 1e-12


class LengthControl(NamedTuple):
    """Result of the regression."""

    win_rate: float
    """Win rate at equal lengths; NaN if lengths and preferences cannot be told apart."""
    quality: float
    """Log-odds of a win at equal lengths."""
    length: float
    """Log-odds that a much longer answer gains."""


def length_controlled_win_rate(
    preferences: Sequence[float], length_differences: Sequence[float], *, ridge: float = 1.0
) -> LengthControl:
    """Return the win rate of a model where its answers are as long as the baseline's.

    ``P(win) = sigmoid(quality + length tanh(difference / std(difference)))``. The length's coefficient has a weak L2
    penalty, so that a model cannot gain by answers whose length predicts the judge's preference perfectly.

    Args:
        preferences: 1 for a win of the model, 0 for a loss, fractions between.
        length_differences: Length of the model's answer minus that of the baseline's, in any unit.
        ridge: Weight of ``length^2 / 2`` against the sum of cross-entropies. Unitless.

    Raises:
        DataError: If there are none, or not equally many.

    Source:
        Dubois et al. 2024, arXiv:2404.04475, section 3.

    Example:
        >>> round(length_controlled_win_rate([1, 1, 1, 0], [90, 80, 70, -100]).win_rate, 2)
        0.7
    """
    y, lengths = np.asarray(preferences, dtype=np.float64), np.asarray(length_differences, dtype=np.float64)
    if not len(y) or len(y) != len(lengths):
        raise DataError(f"{len(y)} preferences and {len(lengths)} differences of lengths; one of each is needed.")
    mean, spread = float(y.mean()), float(lengths.std())
    if mean in (0.0, 1.0):
        return LengthControl(mean, math.copysign(math.inf, mean - 0.5), 0.0)
    if spread == 0 and lengths[0] != 0:
        return LengthControl(math.nan, math.nan, math.nan)
    x = np.tanh(lengths / spread) if spread else np.zeros_like(lengths)
    quality, length = _fit(y, np.stack([np.ones_like(x), x], axis=1), np.array([0.0, ridge]))
    return LengthControl(1 / (1 + math.exp(-quality)), quality, length)


def _fit(y: np.ndarray, columns: np.ndarray, ridge: np.ndarray) -> tuple[float, float]:
    """Minimise cross-entropy plus penalty by Newton's method, halving steps that do not go down."""
    mean = float(y.mean())
    theta = np.array([math.log(mean / (1 - mean)), 0.0])

    def cost(at: np.ndarray) -> float:
        logits = columns @ at
        return float((np.logaddexp(0.0, logits) - y * logits).sum() + (ridge * at**2).sum() / 2)

    value = cost(theta)
    for _ in range(_ITERATIONS):
        p = 0.5 * (1 + np.tanh(columns @ theta / 2))
        gradient = columns.T @ (p - y) + ridge * theta
        curvature = (columns * (p * (1 - p))[:, None]).T @ columns + np.diag(ridge + 1e-12)
        step = np.linalg.solve(curvature, gradient)
        while (lower := cost(theta - step)) > value + 1e-12 * abs(value) and np.abs(step).max() > _TOLERANCE:
            step = step / 2
        theta, value = theta - step, lower
        if np.abs(step).max() < _TOLERANCE:
            break
    return float(theta[0]), float(theta[1])

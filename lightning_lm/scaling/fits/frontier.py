"""The compute-optimal frontier as power laws of the budget, which approaches 1 and 2 fit without a law of the loss."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lightning_lm.scaling.fits.laws import Law
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN, FloatArray
from lightning_lm.scaling.fits.solver import EXPONENTS, Problem, minimise, non_negative

__all__ = ["FrontierLaw", "floor_and_power", "frontier_through"]


@dataclass(frozen=True, kw_only=True)
class FrontierLaw(Law):
    """``N_opt = k C^a``, ``L_opt = E + K / C^g``, and beside the optimum ``L_opt exp(curvature log(N / N_opt)^2)``.

    Source:
        Hoffmann et al. 2022, arXiv:2203.15556, sections 3.1 and 3.2.
    """

    names: ClassVar[tuple[str, ...]] = ("k", "a", "E", "K", "g", "curvature")

    @property
    def _centre(self) -> float:
        return float(np.log(FLOPS_PER_PARAMETER_TOKEN * self.size_centre * self.token_centre))

    def log_loss(self, theta: FloatArray, parameters: FloatArray, tokens: FloatArray, **more: Any) -> FloatArray:  # noqa: ARG002
        """Return the logarithm of the loss, [batch, points]."""
        log_k, a, e, k, g, curvature = (theta[:, [index]] for index in range(6))
        budget = np.log(FLOPS_PER_PARAMETER_TOKEN * parameters * tokens) - self._centre
        away = np.log(parameters / self.size_centre) - log_k - a * budget
        return np.asarray(np.logaddexp(e, k - g * budget) + curvature * away**2)

    def published(self, theta: FloatArray) -> FloatArray:
        """Return k, a, E, K, g and the curvature."""
        log_k, a, e, k, g, curvature = theta.T
        size = np.exp(log_k + np.log(self.size_centre) - a * self._centre)
        return np.stack([size, a, np.exp(e), np.exp(k + g * self._centre), g, curvature], axis=-1)

    def optimal_size(self, theta: FloatArray, flops: float, **more: Any) -> FloatArray:  # noqa: ARG002
        """Return ``k C^a``, [batch]."""
        return np.asarray(self.size_centre * np.exp(theta[:, 0] + theta[:, 1] * (np.log(flops) - self._centre)))


def frontier_through(
    log_flops: FloatArray, log_sizes: FloatArray, losses: FloatArray, curvatures: FloatArray
) -> FloatArray:
    """Return the inner parameters of a `FrontierLaw` through optima, for a batch of repetitions.

    Args:
        log_flops: Logarithms of the budgets around the centre, [budgets] or [batch, budgets].
        log_sizes: Logarithms of the optimal sizes around the centre, [batch, budgets].
        losses: At the optima, [batch, budgets].
        curvatures: [batch].
    """
    log_flops = np.broadcast_to(log_flops, log_sizes.shape)
    middle, height = log_flops.mean(1, keepdims=True), log_sizes.mean(1, keepdims=True)
    a = ((log_flops - middle) * (log_sizes - height)).sum(1) / ((log_flops - middle) ** 2).sum(1)
    log_k = height[:, 0] - a * middle[:, 0]
    return np.stack([log_k, a, *floor_and_power(log_flops, losses).T, curvatures], axis=-1)


def floor_and_power(log_flops: FloatArray, losses: FloatArray) -> FloatArray:
    """Return e, k and g of ``exp(e) + exp(k - g log_flops)``, [batch, 3].

    Args:
        log_flops: Logarithms of the budgets around a centre, [batch, budgets]; each row has the same.
        losses: Losses at the budgets, [batch, budgets].
    """
    # The measurements travel as fixed columns of the parameters.
    number, ones = losses.shape[1], np.ones(losses.shape[1])
    powers = np.exp(-EXPONENTS[:, None] * log_flops[0])
    columns = np.stack([np.ones_like(powers), powers], axis=-1) / losses[0][:, None]
    coefficients, cost = non_negative(columns, ones, ones)
    best = int(np.argmin(cost))
    start = np.array([*np.log(np.maximum(coefficients[best], 1e-8)), EXPONENTS[best]])
    theta = np.concatenate([np.tile(start, (len(losses), 1)), log_flops, np.log(losses)], axis=1)

    def residuals(theta: FloatArray) -> FloatArray:
        flops, target = theta[:, 3 : 3 + number], theta[:, 3 + number :]
        return np.asarray(np.logaddexp(theta[:, [0]], theta[:, [1]] - theta[:, [2]] * flops) - target)

    free = np.arange(theta.shape[1]) < 3
    solved, _ = minimise(
        Problem(residuals=residuals, delta=1.0), theta, np.ones_like(losses), free=free, tolerance=1e-7
    )
    return solved[:, :3]

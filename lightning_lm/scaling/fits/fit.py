"""`ScalingFit`: a fitted law with its intervals, and what it says about runs that were not made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lightning_lm.errors import ConfigurationError
from lightning_lm.scaling.fits.diagnostics import Finding
from lightning_lm.scaling.fits.laws import Law
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN, FloatArray, Points

__all__ = ["Estimate", "Optimum", "ScalingFit", "for_few_runs"]


class Estimate(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float

    def __contains__(self, number: object) -> bool:
        """Return whether a number lies in the interval."""
        return isinstance(number, int | float) and self.low <= number <= self.high


class Optimum(NamedTuple):
    """Compute-optimal allocation of a budget."""

    flops: float
    parameters: Estimate
    tokens: Estimate
    tokens_per_parameter: Estimate
    loss: Estimate


@dataclass(frozen=True, kw_only=True, eq=False)
class ScalingFit:
    """A law, its parameters, and the same parameters of resampled runs, from which every interval is read.

    Args:
        law: The form.
        theta: Its inner parameters, [parameters].
        samples: Those of the bootstraps, [bootstraps, parameters]; intervals are missing where there are none.
        points: The runs that were fitted.
        dropped: The runs that the outlier policy left out; ``None`` for none.
        residuals: Logarithm of the fitted over the measured loss of each point.
        findings: Diagnostics to read before trusting the fit.
        method: Its name.
        widening: Factor on the spread of predicted losses: resampling few runs understates it; see `for_few_runs`.
    """

    law: Law
    theta: FloatArray
    samples: FloatArray
    points: Points
    residuals: FloatArray
    dropped: Points | None = None
    findings: tuple[Finding, ...] = ()
    method: str = "parametric"
    widening: float = 1.0

    @property
    def values(self) -> Mapping[str, float]:
        """The parameters as papers give them, by name."""
        return dict(zip(self.law.names, self.law.published(self.theta[None])[0].tolist(), strict=True))

    def intervals(self, level: float = 0.95) -> Mapping[str, Estimate]:
        """Return the parameters with their intervals, by name.

        Args:
            level: The share of repetitions in which an interval should hold the truth.
        """
        both = self.law.published(self._both)
        return {name: _estimate(both[:, index], level) for index, name in enumerate(self.law.names)}

    def predict(self, parameters: float, tokens: float, *, level: float = 0.95, **more: Any) -> Estimate:
        """Return the loss that the law gives, with the interval in which the law may lie.

        Args:
            parameters: Size of the model.
            tokens: To train on.
            level: Confidence level of the interval.
            more: Further columns of the law, such as ``unique_tokens``.
        """
        return _estimate(self._losses(parameters, tokens, **more), level)

    def predict_run(self, parameters: float, tokens: float, *, level: float = 0.95, **more: Any) -> Estimate:
        """Return the loss that a run would have, with an interval that also holds the runs' own scatter.

        Args:
            parameters: Size of the model.
            tokens: To train on.
            level: Confidence level of the interval.
            more: Further columns of the law, such as ``unique_tokens``.
        """
        losses = self._losses(parameters, tokens, **more)
        scatter = self.residuals * for_few_runs(len(self.points), len(self.theta))
        noise = np.random.default_rng(0).choice(scatter, len(losses) - 1)
        return _estimate(losses * np.exp(np.concatenate([[0.0], -noise])), level)

    def optimal(self, flops: float, *, level: float = 0.95, **more: Any) -> Optimum:
        """Return the size and the data with the least loss for a budget.

        Args:
            flops: FLOPs of training, in the convention in which the sizes were counted.
            level: Confidence level of the intervals.
            more: Further columns of the law, such as ``unique_tokens``.

        Raises:
            ConfigurationError: If the budget is not positive.
        """
        if not (np.isfinite(flops) and flops > 0):
            raise ConfigurationError(f"A budget of {flops} FLOPs cannot be spent; give a positive number such as 1e21.")
        both = self._both
        size = self.law.optimal_size(both, flops, **more)
        tokens = flops / FLOPS_PER_PARAMETER_TOKEN / size
        loss = self._widened(self.law.log_loss(both, size[:, None], tokens[:, None], **more)[:, 0])
        found = [_estimate(column, level) for column in (size, tokens, tokens / size, loss)]
        return Optimum(flops, found[0], found[1], found[2], found[3])

    @property
    def exponents(self) -> tuple[Estimate, Estimate]:
        """Exponents of optimal size and tokens in the budget: ``a`` and ``b`` of ``N ~ C^a, D ~ C^b``."""
        budgets = self.points.flops.max() * np.array([1.0, np.e])
        sizes = [self.law.optimal_size(self._both, budget, **self._unlimited) for budget in budgets]
        a = np.log(sizes[1] / sizes[0])
        return _estimate(a, 0.95), _estimate(1 - a, 0.95)

    @property
    def _unlimited(self) -> dict[str, Any]:
        return {} if self.points.unique_tokens is None else {"unique_tokens": np.array([np.inf])}

    @property
    def _both(self) -> FloatArray:
        """The point estimate, and the bootstraps behind it."""
        return np.concatenate([self.theta[None], self.samples])

    def _losses(self, parameters: float, tokens: float, **more: Any) -> FloatArray:
        columns = {name: np.array([value], dtype=float) for name, value in more.items()}
        return self._widened(self.law.log_loss(self._both, np.array([parameters]), np.array([tokens]), **columns)[:, 0])

    def _widened(self, log_losses: FloatArray) -> FloatArray:
        return np.asarray(np.exp(log_losses[0] + self.widening * (log_losses - log_losses[0])))


def for_few_runs(number: int, parameters: int) -> float:
    """Return by how much residuals and resampled fits of few runs scatter too little.

    Args:
        number: Number of runs.
        parameters: That were fitted to them.

    Source:
        ``(n / (n - p)) ** 0.5``: MacKinnon and White 1985, HC1; then Student's 95 % interval over the normal one
        (the expansion of Cornish and Fisher 1938).
    """
    z, freedom = 1.959964, max(1, number - parameters)
    student = 1 + (z**2 + 1) / (4 * freedom) + (5 * z**4 + 16 * z**2 + 3) / (96 * freedom**2)
    return float(np.sqrt(number / freedom) * student)


def _estimate(values: FloatArray, level: float) -> Estimate:
    """Make an estimate of a value and, behind it, those of its bootstraps."""
    rest = values[1:][np.isfinite(values[1:])]
    if not len(rest):
        return Estimate(float(values[0]), float("nan"), float("nan"))
    low, high = np.quantile(rest, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values[0]), float(low), float(high))

"""Critical batch size: from the noise scale of the gradient, and from finished runs."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lightning_lm.errors import DataError
from lightning_lm.scaling.fits.fit import Estimate
from lightning_lm.scaling.fits.points import FloatArray
from lightning_lm.scaling.fits.solver import Problem, minimise

__all__ = ["CriticalBatch", "NoiseMoments", "fit_critical_batch", "noise_moments"]


class NoiseMoments(NamedTuple):
    """Unbiased estimates of one step. Average each over steps, then divide: the mean of ratios is far too large."""

    signal: float
    """Squared norm of the true gradient."""
    noise: float
    """Trace of the covariance of one example's gradient."""


def noise_moments(small_norm_sq: float, big_norm_sq: float, *, small: float, big: float) -> NoiseMoments:
    """Return the noise moments from gradients of the same step, of a small batch and of a large one that contains it.

    Args:
        small_norm_sq: Squared norm of the mean gradient of the small batch.
        big_norm_sq: Squared norm of the mean gradient of the large batch.
        small: Size of the small batch.
        big: Size of the large batch, in the same unit.

    Raises:
        DataError: If the large batch is not larger.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.
    """
    if not 0 < small < big:
        raise DataError(f"Batches of {small} and {big} cannot be compared; the second must be larger.")
    signal = (big * big_norm_sq - small * small_norm_sq) / (big - small)
    noise = (small_norm_sq - big_norm_sq) / (1 / small - 1 / big)
    return NoiseMoments(signal, noise)


class CriticalBatch(NamedTuple):
    """The batch size that takes twice the fewest steps and twice the fewest examples."""

    batch_size: Estimate
    min_steps: Estimate


def fit_critical_batch(
    batch_sizes: ArrayLike, steps: ArrayLike, *, num_bootstraps: int = 400, seed: int = 0
) -> CriticalBatch:
    """Fit ``S = S_min (1 + B_crit / B)`` to the steps that runs of several batch sizes took to the same loss.

    Args:
        batch_sizes: Batch size of each run.
        steps: Number of steps to the loss that all reached.
        num_bootstraps: Number of resamplings of the runs.
        seed: Seed of the resampling.

    Raises:
        DataError: If there are fewer than four runs or three batch sizes.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, equation 2.11.
    """
    sizes, taken = (np.asarray(column, dtype=np.float64) for column in (batch_sizes, steps))
    if len(sizes) < 4 or len(np.unique(sizes)) < 3:
        raise DataError(f"{len(sizes)} runs of {len(np.unique(sizes))} batch sizes; needed are 4 of at least 3 sizes.")

    def residuals(theta: FloatArray) -> FloatArray:
        return np.asarray(theta[:, [0]] + np.log1p(np.exp(theta[:, [1]] - np.log(sizes))) - np.log(taken))

    start = np.array([[np.log(taken.min() / 2), np.log(np.median(sizes))]])
    problem, ones = Problem(residuals=residuals, delta=0.1), np.ones((1, len(sizes)))
    theta = minimise(problem, start, ones)[0]
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), num_bootstraps).astype(float)
    samples = minimise(problem, np.repeat(theta, num_bootstraps, axis=0), drawn, tolerance=1e-6)[0]
    low, high = np.exp(np.quantile(samples, [0.025, 0.975], axis=0))
    fewest, critical = np.exp(theta[0])
    return CriticalBatch(
        Estimate(float(critical), float(low[1]), float(high[1])), Estimate(float(fewest), float(low[0]), float(high[0]))
    )

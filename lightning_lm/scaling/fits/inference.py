"""The best model when answering costs too: smaller and trained for longer than Chinchilla's."""

from typing import NamedTuple

import numpy as np

from lightning_lm.errors import ConfigurationError
from lightning_lm.scaling.fits.fit import Estimate, ScalingFit
from lightning_lm.scaling.fits.laws import ChinchillaLaw, GeneralLaw, golden_section
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN, FloatArray

__all__ = ["InferenceOptimum", "optimal_with_inference"]

_FLOPS_PER_SERVED_TOKEN = 2.0
"""FLOPs per parameter: the forward pass alone."""


class InferenceOptimum(NamedTuple):
    """The cheapest way to a quality, training and serving together."""

    loss: float
    parameters: Estimate
    tokens: Estimate
    total_flops: Estimate
    saved: float
    """Fraction of the FLOPs that the compute-optimal model of the same quality would take."""


def optimal_with_inference(
    fit: ScalingFit, loss: float, served_tokens: float, *, level: float = 0.95
) -> InferenceOptimum:
    """Return size and training tokens with the least ``6 N D + 2 N D_served`` for a target loss.

    Args:
        fit: Result of `fit_parametric` or `fit_general`.
        loss: Target loss, nats per token.
        served_tokens: Tokens that the model will process in inference over its lifetime.
        level: Confidence level of the intervals.

    Raises:
        ConfigurationError: If the law has no such form, or the loss is below its floor.

    Source:
        Sardana et al. 2023, arXiv:2401.00448, equation 3.
    """
    if not isinstance(fit.law, ChinchillaLaw | GeneralLaw):
        raise ConfigurationError(
            f"The optimum with inference needs fit_parametric or fit_general, not a {type(fit.law).__name__}."
        )
    floor = fit.values["E"]
    if not floor < loss < np.inf:
        raise ConfigurationError(f"A loss of {loss:g} cannot be reached: the floor of the law is {floor:.4g} nats.")
    if served_tokens < 0:
        raise ConfigurationError(f"served_tokens={served_tokens:g} is negative; give 0 for training alone.")
    everything = np.concatenate([fit.theta[None], fit.samples])
    published = fit.law.published(everything)
    usable = (published[:, 0] < loss) & (published[:, [2, 4]] > 0).all(1)
    size, tokens, cost = _cheapest(published[usable], loss, served_tokens)
    plain_size, plain_tokens, _ = _cheapest(published[:1], loss, 0.0)
    plain = plain_size * (FLOPS_PER_PARAMETER_TOKEN * plain_tokens + _FLOPS_PER_SERVED_TOKEN * served_tokens)
    estimates = [_with_interval(column, level) for column in (size, tokens, cost)]
    return InferenceOptimum(loss, estimates[0], estimates[1], estimates[2], float(1 - cost[0] / plain[0]))


def _cheapest(published: FloatArray, loss: float, served: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    e, a, alpha, b, beta, *gamma = published.T
    left = (loss - e) ** (1 / gamma[0] if gamma else 1.0)

    def tokens_for(log_size: FloatArray) -> FloatArray:
        return np.asarray((b / (left - a * np.exp(-alpha * log_size))) ** (1 / beta))

    def log_cost(log_size: FloatArray) -> FloatArray:
        trained = FLOPS_PER_PARAMETER_TOKEN * tokens_for(log_size)
        return np.asarray(log_size + np.log(trained + _FLOPS_PER_SERVED_TOKEN * served))

    smallest = np.log(a / left) / alpha  # with endless data
    log_size = golden_section(log_cost, smallest + 1e-9, smallest + 40.0 / alpha.clip(0.1))
    return np.exp(log_size), tokens_for(log_size), np.exp(log_cost(log_size))


def _with_interval(values: FloatArray, level: float) -> Estimate:
    if len(values) < 2:
        return Estimate(float(values[0]), float("nan"), float("nan"))
    low, high = np.quantile(values[1:], [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values[0]), float(low), float(high))

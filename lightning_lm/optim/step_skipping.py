"""Steps that should not be taken: non-finite gradients, and gradients far larger than usual."""

import abc
import dataclasses
import math
from typing import Any

from lightning_lm.parts import Limit, Part

__all__ = ["NonFinite", "SkipRule", "Spike"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipRule(Part, abc.ABC):
    """Base of every rule that decides whether an optimizer step is skipped."""

    @abc.abstractmethod
    def reason(self, grad_norm: float, history: "NormHistory") -> str | None:
        """Return why a step with this gradient norm must be skipped, or ``None`` to take it."""


@dataclasses.dataclass
class NormHistory:
    """Running statistics of the logarithms of the gradient norms of the steps that were taken.

    Args:
        mean: Running mean.
        variance: Running variance.
        count: Steps remembered.
    """

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def add(self, grad_norm: float, *, window: int) -> None:
        """Move the exponential averages by one step; over the first `window` steps they are plain averages."""
        value = math.log(grad_norm)
        self.count += 1
        rate = 1.0 / min(self.count, window)
        difference = value - self.mean
        self.mean += rate * difference
        self.variance = (1 - rate) * (self.variance + rate * difference**2)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonFinite(SkipRule):
    """Skips steps whose gradient contains an infinity or NaN, which would destroy every weight at once."""

    def reason(self, grad_norm: float, history: NormHistory) -> str | None:  # noqa: ARG002
        """Return a reason if the norm is not finite."""
        return None if math.isfinite(grad_norm) else f"gradient norm {grad_norm}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spike(
    NonFinite,
    limits={
        "deviations": Limit.POSITIVE,
        "min_factor": Limit.POSITIVE,
        "window": Limit.COUNT,
        "warmup": Limit.NON_NEGATIVE,
    },
):
    """Also skips steps whose gradient norm is far above its recent values.

    The logarithm of the norm is compared with its running mean and standard deviation, because norms vary by factors.

    Source:
        OLMo Team 2024, arXiv:2501.00656, section 3 (skipping steps on spikes), on logarithms here.
    """

    deviations: float = 6.0
    """Standard deviations above the mean of the logarithm that make a spike."""
    min_factor: float = 2.0
    """A norm below this many times the usual one is never a spike."""
    window: int = 128
    """Steps over which mean and deviation are taken."""
    warmup: int = 32
    """Steps before the first spike can be found."""

    def reason(self, grad_norm: float, history: NormHistory) -> str | None:
        """Return a reason if the norm is not finite or a spike; otherwise remember the norm."""
        found = super().reason(grad_norm, history)
        if found is not None:
            return found
        if grad_norm == 0:  # a step without targets is no observation of the norm
            return None
        margin = max(self.deviations * math.sqrt(history.variance), math.log(self.min_factor))
        if history.count >= self.warmup and math.log(grad_norm) > history.mean + margin:
            return f"gradient norm {grad_norm:.3g} where {math.exp(history.mean):.3g} is usual"
        history.add(grad_norm, window=self.window)
        return None

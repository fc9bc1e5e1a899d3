"""Forms of the loss as a function of size and data. A law knows its formula; `parametric` fits it."""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lightning_lm.errors import DataError
from lightning_lm.parts import Limit, Part
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN, FloatArray, Points

__all__ = ["ChinchillaLaw", "DataConstrainedLaw", "GeneralLaw", "KaplanLaw", "Law"]

_SEARCH_STEPS = 90
_GOLDEN = (np.sqrt(5.0) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Law(Part, abc.ABC, limits={"size_centre": Limit.POSITIVE, "token_centre": Limit.POSITIVE}):
    """Base of the laws. What is fitted are logarithms and exponents around a centre, which makes them comparable.

    Args:
        size_centre: Parameters, in whose multiples sizes are counted inside.
        token_centre: Tokens, in whose multiples data are counted inside.
    """

    names: ClassVar[tuple[str, ...]] = ()
    """Names of the published parameters, in the order of the inner ones."""

    size_centre: float = 1.0
    token_centre: float = 1.0

    @abc.abstractmethod
    def log_loss(self, theta: FloatArray, parameters: FloatArray, tokens: FloatArray, **more: Any) -> FloatArray:
        """Return the logarithm of the loss, [batch, points].

        Args:
            theta: Inner parameters, [batch, parameters].
            parameters: Sizes, [points] or [batch, points].
            tokens: Tokens of the runs, likewise.
            more: Further columns, such as ``unique_tokens``.
        """

    @abc.abstractmethod
    def published(self, theta: FloatArray) -> FloatArray:
        """Return the parameters as papers give them, in the order of ``names``.

        Args:
            theta: Inner parameters, [batch, parameters].
        """

    def slopes(self, theta: FloatArray, parameters: FloatArray, tokens: FloatArray, **more: Any) -> FloatArray | None:
        """Return the derivatives of `log_loss`, [batch, points, parameters]; ``None`` to have them measured.

        Args:
            theta: Inner parameters, [batch, parameters].
            parameters: Sizes, [points].
            tokens: Tokens of the runs, [points].
            more: Further columns.
        """

    def columns(self, points: Points) -> dict[str, FloatArray]:
        """Return what `log_loss` takes beside theta.

        Args:
            points: The runs.
        """
        return {"parameters": points.parameters, "tokens": points.tokens}

    def optimal_size(self, theta: FloatArray, flops: float, **more: Any) -> FloatArray:
        """Return the size with the least loss for a budget, [batch], searched by golden section.

        Args:
            theta: Inner parameters, [batch, parameters].
            flops: The budget.
            more: Further columns, the same for every size.
        """

        def loss(log_size: FloatArray) -> FloatArray:
            size = np.exp(log_size)[:, None]
            tokens = flops / FLOPS_PER_PARAMETER_TOKEN / size
            return self.log_loss(theta, size, tokens, **more)[:, 0]

        return np.exp(golden_section(loss, np.zeros(len(theta)), np.full(len(theta), np.log(flops / 6))))


def golden_section(function: Any, low: FloatArray, high: FloatArray) -> FloatArray:
    """Return where functions with one minimum have it, for a batch of intervals.

    Args:
        function: From [batch] to [batch].
        low: Left ends.
        high: Right ends.
    """
    for _ in range(_SEARCH_STEPS):
        width = _GOLDEN * (high - low)
        left, right = high - width, low + width
        falls = function(left) > function(right)
        low, high = np.where(falls, left, low), np.where(falls, high, right)
    return np.asarray((low + high) / 2)


@dataclass(frozen=True, kw_only=True)
class ChinchillaLaw(Law):
    """``E + A / N^alpha + B / D^beta``.

    Source:
        Hoffmann et al. 2022, arXiv:2203.15556, equation 2 (approach 3).
    """

    names: ClassVar[tuple[str, ...]] = ("E", "A", "alpha", "B", "beta")

    def _terms(self, theta: FloatArray, parameters: FloatArray, tokens: FloatArray) -> FloatArray:
        e, a, alpha, b, beta = (theta[:, [index]] for index in range(5))
        size, data = np.log(parameters / self.size_centre), np.log(tokens / self.token_centre)
        size, data = (
            np.broadcast_to(size, (len(theta), size.shape[-1])),
            np.broadcast_to(data, (len(theta), data.shape[-1])),
        )
        return np.stack([np.broadcast_to(e, size.shape), a - alpha * size, b - beta * data])

    def log_loss(self, theta: FloatArray, parameters: FloatArray, tokens: FloatArray, **more: Any) -> FloatArray:  # noqa: ARG002
        """Return the logarithm of the loss, [batch, points]."""
        return log_sum(self._terms(theta, parameters, tokens))

    def slopes(self, theta: FloatArray, parameters: FloatArray, tokens: FloatArray, **more: Any) -> FloatArray:  # noqa: ARG002
        """Return the derivatives of `log_loss`: the shares of the three terms, times their logarithms."""
        terms = self._terms(theta, parameters, tokens)
        floor, size, data = np.exp(terms - log_sum(terms))
        log_size, log_data = np.log(parameters / self.size_centre), np.log(tokens / self.token_centre)
        return np.stack([floor, size, -log_size * size, data, -log_data * data], axis=-1)

    def published(self, theta: FloatArray) -> FloatArray:
        """Return E, A, alpha, B, beta."""
        e, a, alpha, b, beta = theta.T
        large_a = np.exp(a + alpha * np.log(self.size_centre))
        return np.stack([np.exp(e), large_a, alpha, np.exp(b + beta * np.log(self.token_centre)), beta], axis=-1)

    def optimal_size(self, theta: FloatArray, flops: float, **more: Any) -> FloatArray:  # noqa: ARG002
        """Return ``G (C/6)^(beta / (alpha + beta))`` with ``G = (alpha A / (beta B))^(1 / (alpha + beta))``.

        Source:
            Hoffmann et al. 2022, arXiv:2203.15556, equation 4.
        """
        _, a, alpha, b, beta = theta.T
        budget = np.log(flops / FLOPS_PER_PARAMETER_TOKEN) - np.log(self.size_centre) - np.log(self.token_centre)
        # Bootstraps may leave a falling law; the size is then no number.
        with np.errstate(invalid="ignore", divide="ignore"):
            log_size = (np.log(alpha) + a - np.log(beta) - b + beta * budget) / (alpha + beta)
        return np.asarray(np.exp(log_size) * self.size_centre)


@dataclass(frozen=True, kw_only=True)
class KaplanLaw(Law):
    """``((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D``: no floor, so it cannot hold for ever.

    Source:
        Kaplan et al. 2020, arXiv:2001.08361, equation 1.5.
    """

    names: ClassVar[tuple[str, ...]] = ("alpha_N", "N_c", "alpha_D", "D_c")

    def log_loss(self, theta: FloatArray, parameters: FloatArray, tokens: FloatArray, **more: Any) -> FloatArray:  # noqa: ARG002
        """Return the logarithm of the loss, [batch, points]."""
        log_exponent, log_ratio, a, b = (theta[:, [index]] for index in range(4))
        size = a - np.exp(log_ratio) * np.log(parameters / self.size_centre)
        data = b - np.log(tokens / self.token_centre)
        return np.asarray(np.exp(log_exponent) * np.logaddexp(size, data))

    def published(self, theta: FloatArray) -> FloatArray:
        """Return alpha_N, N_c, alpha_D, D_c."""
        exponent, ratio = np.exp(theta[:, 0]), np.exp(theta[:, 1])
        size = np.exp(theta[:, 2] / ratio) * self.size_centre
        return np.stack([exponent * ratio, size, exponent, np.exp(theta[:, 3]) * self.token_centre], axis=-1)


@dataclass(frozen=True, kw_only=True)
class GeneralLaw(Law):
    """``E + (A / N^alpha + B / D^beta)^gamma``: Chinchilla's law where gamma is 1, Kaplan's where E is 0 and beta 1.

    How steeply the loss rises beside the optimum no longer says how fast it falls along the frontier.

    Source:
        Busbridge et al. 2025, arXiv:2502.08606, equation 1.
    """

    names: ClassVar[tuple[str, ...]] = (*ChinchillaLaw.names, "gamma")

    def log_loss(self, theta: FloatArray, parameters: FloatArray, tokens: FloatArray, **more: Any) -> FloatArray:  # noqa: ARG002
        """Return the logarithm of the loss, [batch, points]."""
        size, data = self._terms(theta, parameters, tokens)
        return np.asarray(np.logaddexp(theta[:, [0]], np.exp(theta[:, [5]]) * np.logaddexp(size, data)))

    def slopes(self, theta: FloatArray, parameters: FloatArray, tokens: FloatArray, **more: Any) -> FloatArray:  # noqa: ARG002
        """Return the derivatives of `log_loss`: shares of the terms, inside the power and outside."""
        size, data = self._terms(theta, parameters, tokens)
        inside, gamma = np.logaddexp(size, data), np.exp(theta[:, [5]])
        loss = np.logaddexp(theta[:, [0]], gamma * inside)
        above = gamma * np.exp(gamma * inside - loss)
        by_size, by_data = above * np.exp(size - inside), above * np.exp(data - inside)
        log_size, log_data = np.log(parameters / self.size_centre), np.log(tokens / self.token_centre)
        floor = np.exp(theta[:, [0]] - loss)
        return np.stack([floor, by_size, -log_size * by_size, by_data, -log_data * by_data, above * inside], axis=-1)

    def _terms(self, theta: FloatArray, parameters: FloatArray, tokens: FloatArray) -> tuple[FloatArray, FloatArray]:
        a, alpha, b, beta = (theta[:, [index]] for index in range(1, 5))
        size = a - alpha * np.log(parameters / self.size_centre)
        return size, b - beta * np.log(tokens / self.token_centre)

    def published(self, theta: FloatArray) -> FloatArray:
        """Return E, A, alpha, B, beta, gamma."""
        return np.concatenate([self._inside.published(theta[:, :5]), np.exp(theta[:, 5:])], axis=1)

    def optimal_size(self, theta: FloatArray, flops: float, **more: Any) -> FloatArray:  # noqa: ARG002
        """Return Chinchilla's, as a power of a sum is smallest where the sum is."""
        return self._inside.optimal_size(theta[:, :5], flops)

    @property
    def _inside(self) -> ChinchillaLaw:
        return ChinchillaLaw(size_centre=self.size_centre, token_centre=self.token_centre)


@dataclass(frozen=True, kw_only=True)
class DataConstrainedLaw(Law):
    """Chinchilla's law where repeated tokens count less and less, and so do parameters beyond what unique ones can use.

    ``D' = U_D + U_D R_D* (1 - exp(-R_D / R_D*))`` with ``R_D`` repetitions after the first epoch, and ``N'`` likewise
    around the size that is optimal for the unique tokens.

    Source:
        Muennighoff et al. 2023, arXiv:2305.16264, equations 5 and 6 and appendix A.
    """

    names: ClassVar[tuple[str, ...]] = (*ChinchillaLaw.names, "R_N", "R_D")

    @property
    def _base(self) -> ChinchillaLaw:
        return ChinchillaLaw(size_centre=self.size_centre, token_centre=self.token_centre)

    def columns(self, points: Points) -> dict[str, FloatArray]:
        """Return sizes, tokens and unique tokens."""
        if points.unique_tokens is None:
            raise DataError("The data-constrained law needs unique_tokens, the tokens of one epoch, for every run.")
        return {**super().columns(points), "unique_tokens": points.unique_tokens}

    def log_loss(self, theta: FloatArray, parameters: FloatArray, tokens: FloatArray, **more: Any) -> FloatArray:
        """Return the logarithm of the loss, [batch, points]."""
        base = theta[:, :5]
        unique = np.minimum(np.broadcast_to(more["unique_tokens"], np.broadcast_shapes(tokens.shape)), tokens)
        data = _effective(tokens, unique, theta[:, [6]])
        needed = np.minimum(self._sizes_for(base, unique), parameters)
        return self._base.log_loss(base, _effective(parameters, needed, theta[:, [5]]), data)

    def _sizes_for(self, base: FloatArray, unique: FloatArray) -> FloatArray:
        """Return the size for which the unique tokens are the optimal number, [batch, points]."""
        _, a, alpha, b, beta = (base[:, [index]] for index in range(5))
        data = np.log(unique / self.token_centre)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            log_size = (np.log(alpha) + a - np.log(beta) - b + beta * data) / alpha
            return np.asarray(np.nan_to_num(np.exp(log_size) * self.size_centre, nan=np.inf))

    def published(self, theta: FloatArray) -> FloatArray:
        """Return E, A, alpha, B, beta, R_N*, R_D*."""
        return np.concatenate([self._base.published(theta[:, :5]), np.exp(theta[:, 5:])], axis=1)


def _effective(total: FloatArray, unique: FloatArray, log_half_life: FloatArray) -> FloatArray:
    half_life = np.exp(log_half_life)
    return np.asarray(unique * (1 + half_life * -np.expm1(-(total / unique - 1) / half_life)))


def log_sum(terms: FloatArray) -> FloatArray:
    """Return the logarithm of the sum of exponentials over the first axis, without overflow.

    Args:
        terms: [terms, ...].
    """
    top = terms.max(0)
    return np.asarray(top + np.log(np.exp(terms - top).sum(0)))

"""The loss of a run at every step, whatever its learning-rate schedule: for finishing a run before it is finished."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lightning_lm.errors import DataError
from lightning_lm.scaling.fits.fit import Estimate
from lightning_lm.scaling.fits.parametric import Estimator
from lightning_lm.scaling.fits.points import FloatArray
from lightning_lm.scaling.fits.solver import EXPONENTS, Problem, minimise, non_negative

__all__ = ["AnnealingFit", "AnnealingRun", "fit_annealing"]

_BLOCKS = 12
"""Neighbouring measurements of a curve err together, so the bootstrap draws blocks of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnealingRun:
    """One run: the rate of every step, and the loss at some of them.

    Args:
        rates: Learning rate of each step, or the schedule's multiplier, [steps].
        steps: Steps at which the loss was measured, increasing, from 1.
        loss: Loss at these steps, nats per token.
    """

    rates: FloatArray
    steps: FloatArray
    loss: FloatArray

    def areas(self, memory: float, at: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
        """Return ``S_1`` (the sum of the rates so far) and ``S_2`` (the sum of their delayed falls).

        Args:
            memory: Fraction of a fall of the rate that remains after a step.
            at: Steps to return; those of the measurements when left out.
        """
        falls = -np.diff(self.rates, prepend=self.rates[:1])
        momentum, delayed = 0.0, np.empty(len(falls))
        for index, fall in enumerate(falls.tolist()):
            momentum = memory * momentum + fall
            delayed[index] = momentum
        index_of = (self.steps if at is None else at).astype(int) - 1
        return np.cumsum(self.rates)[index_of], np.cumsum(delayed)[index_of]


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnealingFit:
    """``L(s) = E + A / S_1(s)^alpha - C S_2(s)``.

    Args:
        theta: Logarithms of E and A, alpha, logarithm of C.
        samples: Those of the bootstraps, [bootstraps, 4].
        memory: Fraction of a fall of the rate that remains after a step.
        residuals: Logarithm of the fitted over the measured loss.
    """

    names: ClassVar[tuple[str, ...]] = ("E", "A", "alpha", "C")

    theta: FloatArray
    samples: FloatArray
    memory: float
    residuals: FloatArray

    @property
    def values(self) -> dict[str, float]:
        """The parameters by name."""
        e, a, alpha, c = self.theta.tolist()
        return {"E": float(np.exp(e)), "A": float(np.exp(a)), "alpha": alpha, "C": float(np.exp(c))}

    def predict(self, rates: FloatArray, *, level: float = 0.95) -> Estimate:
        """Return the loss at the end of a schedule, that of a run which was not made included.

        Args:
            rates: Learning rate of each step, in the unit of the fitted runs.
            level: Confidence level of the interval.
        """
        end = np.array([len(rates)])
        run = AnnealingRun(rates=np.asarray(rates, dtype=float), steps=end, loss=np.ones(1))
        areas = tuple(area[None] for area in run.areas(self.memory))
        losses = _loss(np.concatenate([self.theta[None], self.samples]), *areas)[:, 0]
        low, high = np.quantile(losses[1:], [(1 - level) / 2, (1 + level) / 2]) if len(losses) > 1 else (np.nan,) * 2
        return Estimate(float(losses[0]), float(low), float(high))


def fit_annealing(
    runs: Sequence[AnnealingRun], estimator: Estimator = Estimator(), *, memory: float = 0.999
) -> AnnealingFit:
    """Fit the loss of one model over steps of one or several schedules.

    Args:
        runs: Curves of the same model, data and batch size, warm-up left out of ``steps``.
        estimator: Loss and bootstraps; its outlier policy looks at whole runs and is not used here.
        memory: Fraction of a fall of the rate that remains after a step.

    Raises:
        DataError: If there are fewer than eight measurements, or no rate ever falls.

    Source:
        Tissue et al. 2024, arXiv:2408.11029, equation 1.
    """
    both = [run.areas(memory) for run in runs]
    areas = np.concatenate([area for area, _ in both]), np.concatenate([annealed for _, annealed in both])
    loss = np.concatenate([run.loss for run in runs])
    if len(loss) < 8 or not np.any(areas[1] > 0):
        raise DataError(
            f"{len(loss)} measurements, rates that {'fall' if np.any(areas[1] > 0) else 'never fall'}: the law of "
            "annealing needs at least eight, some of them while the learning rate falls."
        )
    problem = Problem(
        residuals=lambda theta: np.log(np.maximum(_loss(theta, *areas), 1e-12)) - np.log(loss), delta=estimator.delta
    )
    weights = np.ones((1, len(loss)))
    theta = minimise(problem, _start(*areas, loss)[None], weights)[0][0]
    lengths = [len(run.loss) for run in runs]
    samples = _bootstrap(problem, theta, lengths, estimator)
    return AnnealingFit(theta=theta, samples=samples, memory=memory, residuals=problem.residuals(theta[None])[0])


def _loss(theta: FloatArray, area: FloatArray, annealed: FloatArray) -> FloatArray:
    e, a, alpha, c = (theta[:, [index]] for index in range(4))
    return np.asarray(np.exp(e) + np.exp(a - alpha * np.log(area)) - np.exp(c) * annealed)


def _start(area: FloatArray, annealed: FloatArray, loss: FloatArray) -> FloatArray:
    powers = area ** -EXPONENTS[:, None]
    flat = np.ones_like(powers)
    # The last coefficient is negative in the law: its column enters with the sign turned.
    columns = np.stack([flat, powers, flat * -annealed], axis=-1) / loss[:, None]
    coefficients, cost = non_negative(columns, np.ones(len(loss)), np.ones(len(loss)))
    best = int(np.argmin(cost))
    e, a, c = np.log(np.maximum(coefficients[best], 1e-8))
    return np.array([e, a, EXPONENTS[best], c])


def _bootstrap(problem: Problem, theta: FloatArray, lengths: list[int], estimator: Estimator) -> FloatArray:
    random, number = np.random.default_rng(estimator.seed), estimator.num_bootstraps
    block_of: list[Any] = []
    for length in lengths:
        first = block_of[-1][-1] + 1 if block_of else 0
        block_of.append(first + np.arange(length) * min(_BLOCKS, length) // length)
    blocks = np.concatenate(block_of)
    drawn = random.multinomial(blocks[-1] + 1, np.full(blocks[-1] + 1, 1 / (blocks[-1] + 1)), number)
    if not number:
        return np.empty((0, len(theta)))
    return minimise(problem, np.tile(theta, (number, 1)), drawn[:, blocks].astype(float), tolerance=1e-6)[0]

"""Prediction of a task's accuracy at a larger budget: from compute to the cost of right answers, and on to accuracy.

The cost (bits per byte, or nats, of the right answer) falls smoothly with compute where accuracy stays at chance and
then jumps. Stage one is a power law with a floor, ``cost = E + K / C^g``; stage two a sigmoid from the level of chance
to a ceiling, ``accuracy = chance + (ceiling - chance) sigmoid((cost_0 - cost) / width)``. Simplified against the
papers: the cost depends on compute alone, and the ceiling is given, not fitted.

Intervals are from a bootstrap of the residuals of both stages, widened for few runs: the budgets are the plan of an
experiment, not a sample.

Source:
    Grattafiori et al. 2024, arXiv:2407.21783, section 3.2.1; Bhagia et al. 2024, arXiv:2412.04403; emergence: Schaeffer
    et al. 2023, arXiv:2304.15004.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightning_lm.errors import DataError
from lightning_lm.scaling.fits.fit import Estimate, for_few_runs
from lightning_lm.scaling.fits.frontier import floor_and_power
from lightning_lm.scaling.fits.points import FloatArray
from lightning_lm.scaling.fits.solver import Problem, minimise
from lightning_lm.scaling.fits.task_runs import TaskRuns

__all__ = ["AccuracyFit", "CostFit", "HeldOutScore", "fit_accuracy", "fit_cost", "hold_out_scores"]

_FEWEST = 4
"""Runs that the three parameters of the first stage need."""
_ERRORS_ABOVE_CHANCE = 2.0
"""Standard errors by which a run's accuracy must differ from chance to say something of the sigmoid."""
_COST, _SIGMOID = 3, 2
"""Parameters of the stages."""
_SHOWN = 3
"""Bends that a remark names."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CostFit:
    """The first stage: ``cost = E + K / C^g``.

    Args:
        theta: ``log E``, ``log K`` and ``g`` around the centre, [1 + bootstraps, 3]; the first row is the estimate.
        centre: Budget in whose multiples compute is counted inside. FLOPs.
        scatter: Widened residuals of log cost, [runs].
        findings: Remarks to read before trusting the fit.
    """

    theta: FloatArray
    centre: float
    scatter: FloatArray
    findings: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Estimate]:
        """Floor E, coefficient K (of a budget of one FLOP) and exponent g, with their intervals."""
        e, k, g = self.theta.T
        with np.errstate(over="ignore"):  # of bootstraps with a steep exponent
            columns = {"E": np.exp(e), "K": np.exp(k + g * np.log(self.centre)), "g": g}
        return {name: _estimate(column) for name, column in columns.items()}

    def samples(self, flops: float) -> FloatArray:
        """Return the cost at a budget: the estimate, then those of the bootstraps, [1 + bootstraps].

        Args:
            flops: The budget.
        """
        e, k, g = self.theta.T
        return np.asarray(np.exp(e) + np.exp(k - g * np.log(flops / self.centre)))

    def predict(self, flops: float) -> Estimate:
        """Return the cost at a budget, with the 95 % interval of the law.

        Args:
            flops: The budget.
        """
        return _estimate(self.samples(flops))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AccuracyFit:
    """The second stage: a sigmoid from chance to the ceiling.

    Args:
        theta: Middle and slope of the sigmoid around the centre, [1 + bootstraps, 2]; the first row is the estimate.
        centre: Mean cost of the runs.
        chance: Accuracy of random answers.
        ceiling: Accuracy of a perfect model.
        scatter: Widened residuals over the standard errors of the accuracies, [runs].
        findings: Remarks to read before trusting the fit.
    """

    theta: FloatArray
    centre: float
    chance: float
    ceiling: float
    scatter: FloatArray
    findings: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Estimate]:
        """Cost at half way between chance and ceiling, and the width of the rise in units of cost."""
        at, slope = self.theta.T
        return {"cost_0": _estimate(self.centre + at / slope), "width": _estimate(1 / slope)}

    def samples(self, costs: FloatArray) -> FloatArray:
        """Return the accuracy at a cost under each bootstrap, [1 + bootstraps].

        Args:
            costs: Cost under each bootstrap, [1 + bootstraps].
        """
        return _sigmoid(self.theta, (costs - self.centre)[:, None], self.chance, self.ceiling)[:, 0]

    def from_compute(self, cost: CostFit, flops: float) -> Estimate:
        """Return the accuracy at a budget, with the 95 % interval of both stages.

        Args:
            cost: The first stage, with as many bootstraps.
            flops: The budget.
        """
        return _estimate(self.samples(cost.samples(flops)))

    def at(self, cost: float) -> Estimate:
        """Return the accuracy at a cost, with the 95 % interval of the sigmoid.

        Args:
            cost: Cost of the right answers.
        """
        return _estimate(self.samples(np.full(len(self.theta), cost)))


class HeldOutScore(NamedTuple):
    """One run that a prediction had not seen."""

    name: str
    flops: float
    cost: float
    accuracy: float
    predicted_cost: Estimate
    """With the scatter of runs in its interval."""
    predicted: Estimate | None
    """Accuracy from compute, with the scatter of runs and items in its interval; ``None`` if it could not be fitted."""
    from_cost: Estimate | None
    """Accuracy from the run's own cost: what the second stage alone gets wrong."""

    @property
    def error(self) -> float | None:
        """Predicted minus measured accuracy."""
        return None if self.predicted is None else self.predicted.value - self.accuracy


def fit_cost(runs: TaskRuns, *, num_bootstraps: int = 1000, seed: int = 0) -> CostFit:
    """Fit the cost of right answers over compute.

    Args:
        runs: At least four runs of at least three budgets.
        num_bootstraps: Resamplings of the residuals.
        seed: Seed of the resampling.

    Raises:
        DataError: If there are too few runs, or the cost does not fall with compute.
    """
    budgets = len(np.unique(np.round(np.log(runs.flops), 2)))
    if len(runs) < _FEWEST or budgets < _FEWEST - 1:
        raise DataError(
            f"{len(runs)} run(s) of {budgets} budget(s) cannot fix a power law with a floor; give at least {_FEWEST} "
            f"runs of {_FEWEST - 1} budgets, and one more to hold out."
        )
    if np.polyfit(np.log(runs.flops), np.log(runs.cost), 1)[0] >= 0:
        raise DataError(
            "The cost of right answers does not fall with compute over these runs, so it predicts nothing. From the "
            f"smallest budget to the largest: {', '.join(f'{cost:.4g}' for cost in runs.cost)}."
        )
    centre = float(np.exp(np.log(runs.flops).mean()))
    log_flops = np.log(runs.flops / centre)
    theta = floor_and_power(log_flops[None], runs.cost[None])[0]
    fitted = np.logaddexp(theta[0], theta[1] - theta[2] * log_flops)
    scatter = _centred(np.log(runs.cost) - fitted) * for_few_runs(len(runs), _COST)
    drawn = np.random.default_rng(seed).choice(scatter, (num_bootstraps, len(runs)))
    samples = np.empty((0, _COST))
    if num_bootstraps:
        samples = floor_and_power(np.tile(log_flops, (num_bootstraps, 1)), np.exp(fitted + drawn))
    findings = _reversals(runs.cost, runs.names, np.zeros(len(runs)), "costs more than the smaller", up=True)
    return CostFit(theta=np.concatenate([theta[None], samples]), centre=centre, scatter=scatter, findings=findings)


def fit_accuracy(runs: TaskRuns, *, num_bootstraps: int = 1000, seed: int = 1) -> AccuracyFit:
    """Fit accuracy over the cost of right answers; runs with more items weigh more.

    Args:
        runs: At least three runs, two of them above chance, and one of these below the ceiling.
        num_bootstraps: Resamplings of the residuals.
        seed: Seed of the resampling.

    Raises:
        DataError: If too few runs are above chance or below the ceiling, or accuracy falls with the cost.
    """
    errors = runs.standard_errors
    _check_accuracy(runs, errors)
    centre = float(runs.cost.mean())
    costs = runs.cost - centre
    start = _start(runs, costs)
    theta = _fitted_sigmoid(runs, costs, start, runs.accuracy[None])[0]
    if theta[1] <= 0:
        raise DataError(
            "Accuracy falls as the right answers become cheaper, so no sigmoid leads from one to the other. Is the "
            "cost that of the same task (--cost)?"
        )
    fitted = _sigmoid(theta[None], costs, runs.chance, runs.ceiling)[0]
    scatter = _centred((runs.accuracy - fitted) / errors) * for_few_runs(len(runs), _SIGMOID)
    random = np.random.default_rng(seed)
    noise = random.choice(scatter, (num_bootstraps, len(runs))) * errors
    samples = np.empty((0, _SIGMOID))
    if num_bootstraps:
        samples = _fitted_sigmoid(runs, costs, theta, np.clip(fitted + noise, 0, 1))
    by_cost = np.argsort(-runs.cost, kind="stable")
    names = [runs.names[index] for index in by_cost]
    what = "is less accurate than the costlier"
    findings = _reversals(runs.accuracy[by_cost], names, 2 * errors[by_cost], what)
    return AccuracyFit(
        theta=np.concatenate([theta[None], samples]),
        centre=centre,
        chance=runs.chance,
        ceiling=runs.ceiling,
        scatter=scatter,
        findings=findings,
    )


def hold_out_scores(runs: TaskRuns, number: int, *, num_bootstraps: int = 1000, seed: int = 0) -> list[HeldOutScore]:
    """Fit both stages without the largest runs, and predict these.

    Args:
        runs: All runs.
        number: Runs to hold out, the largest budgets first.
        num_bootstraps: Resamplings of the residuals.
        seed: Seed of the resampling.

    Raises:
        DataError: If the first stage cannot be fitted to the others.
    """
    rest = runs.where(np.arange(len(runs) - number))
    cost = fit_cost(rest, num_bootstraps=num_bootstraps, seed=seed)
    try:
        accuracy = fit_accuracy(rest, num_bootstraps=num_bootstraps, seed=seed + 1)
    except DataError:
        accuracy = None
    random = np.random.default_rng(seed + 2)
    held = []
    for index in range(len(runs) - number, len(runs)):
        costs, items = cost.samples(runs.flops[index]), runs.num_items[index]
        scattered = costs * np.exp(np.append(0.0, random.choice(cost.scatter, num_bootstraps)))
        both: list[Estimate | None] = [None, None]
        if accuracy is not None:
            own = np.full(num_bootstraps + 1, runs.cost[index])
            both = [_of_a_run(accuracy, at, items, random) for at in (scattered, own)]
        held.append(
            HeldOutScore(
                runs.names[index], float(runs.flops[index]), float(runs.cost[index]), float(runs.accuracy[index]),
                _estimate(scattered), both[0], both[1],
            )
        )  # fmt: skip
    return held


def _of_a_run(fit: AccuracyFit, costs: FloatArray, num_items: float, random: np.random.Generator) -> Estimate:
    """Return the accuracy that a run would measure on so many items."""
    means = fit.samples(costs)
    errors = np.sqrt(np.clip(means * (1 - means), 0.25 / num_items, None) / num_items)
    noise = np.append(0.0, random.choice(fit.scatter, len(means) - 1))
    return _estimate(np.clip(means + noise * errors, 0, 1))


def _check_accuracy(runs: TaskRuns, errors: FloatArray) -> None:
    if len(runs) <= _SIGMOID:
        raise DataError(f"{len(runs)} run(s) cannot fix a sigmoid; give at least {_SIGMOID + 1}.")
    above = runs.accuracy > runs.chance + _ERRORS_ABOVE_CHANCE * errors
    if not above.any():
        raise DataError(
            f"Every run's accuracy is within {_ERRORS_ABOVE_CHANCE:g} standard errors of chance ({runs.chance:.3g}): "
            "nothing is known of the rise. The cost of right answers can be predicted; add larger runs, or more items."
        )
    if (runs.accuracy > runs.ceiling - _ERRORS_ABOVE_CHANCE * errors).all():
        raise DataError(
            f"Every run's accuracy is at the ceiling ({runs.ceiling:.3g}): add smaller runs or a harder task."
        )
    between = above & (runs.accuracy < runs.ceiling - _ERRORS_ABOVE_CHANCE * errors)
    if above.sum() < _SIGMOID or not between.any():
        raise DataError(
            f"{above.sum()} of {len(runs)} runs are above chance ({runs.chance:.3g}) and {between.sum()} of these "
            f"below the ceiling; the slope needs {_SIGMOID} and 1. Add larger runs, or runs between."
        )


def _start(runs: TaskRuns, costs: FloatArray) -> FloatArray:
    """Return middle and slope by least squares on the logits, kept away from the ends."""
    share = np.clip((runs.accuracy - runs.chance) / (runs.ceiling - runs.chance), 0.02, 0.98)
    slope, at = np.polyfit(costs, np.log(share / (1 - share)), 1)
    return np.array([at, max(-slope, 1e-3 / max(float(np.ptp(costs)), 1e-12))])


def _fitted_sigmoid(runs: TaskRuns, costs: FloatArray, start: FloatArray, accuracies: FloatArray) -> FloatArray:
    """Return at and slope for a batch of accuracies, which travel as fixed columns."""
    weights = 1 / runs.standard_errors**2

    def residuals(theta: FloatArray) -> FloatArray:
        return np.asarray(_sigmoid(theta[:, :_SIGMOID], costs, runs.chance, runs.ceiling) - theta[:, _SIGMOID:])

    theta = np.concatenate([np.tile(start, (len(accuracies), 1)), accuracies], axis=1)
    free = np.arange(theta.shape[1]) < _SIGMOID
    solved, _ = minimise(Problem(residuals=residuals, delta=1.0), theta, np.tile(weights, (len(theta), 1)), free=free)
    return solved[:, :_SIGMOID]


def _sigmoid(theta: FloatArray, costs: FloatArray, chance: float, ceiling: float) -> FloatArray:
    logits = theta[:, [0]] - theta[:, [1]] * costs
    return np.asarray(chance + (ceiling - chance) * 0.5 * (1 + np.tanh(logits / 2)))


def _reversals(
    values: FloatArray, names: Sequence[str], allowed: FloatArray, what: str, *, up: bool = False
) -> tuple[str, ...]:
    """Return a remark on values that go the wrong way against their predecessors, beyond the error of both."""
    wrong = np.diff(values) if up else -np.diff(values)
    beyond = wrong > np.hypot(allowed[1:], allowed[:-1])
    found = [
        f"{names[i + 1]} {what} {names[i]} ({values[i + 1]:.4g} after {values[i]:.4g})"
        for i in np.flatnonzero(beyond).tolist()
    ]
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (f"not monotone: {'; '.join(found[:_SHOWN])}{more}.",) if found else ()


def _centred(residuals: FloatArray) -> FloatArray:
    return np.asarray(residuals - residuals.mean())


def _estimate(values: FloatArray) -> Estimate:
    """Make an estimate of a value and, after it, those of its bootstraps."""
    rest = values[1:][np.isfinite(values[1:])]
    if not len(rest):
        return Estimate(float(values[0]), float("nan"), float("nan"))
    low, high = np.quantile(rest, [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high))

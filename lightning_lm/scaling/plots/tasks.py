"""The figure of a task over compute: accuracy, which may jump, beside the cost of right answers, which is smooth."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_lm.scaling.fits.fit import Estimate
from lightning_lm.scaling.fits.points import FloatArray
from lightning_lm.scaling.fits.task_prediction import AccuracyFit, CostFit, HeldOutScore
from lightning_lm.scaling.fits.task_runs import TaskRuns
from lightning_lm.scaling.plots.canvas import INK, label, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["task_figure"]

_BLUE, _ACCENT, _GREY = "#1d4ed8", "#c2410c", "#9ca3af"
_LINE = 120
_UNITS = {
    "gold_bits_per_byte": "bits per byte of the right answer",
    "gold_logprob": "-log-likelihood of the right answer",
}


def task_figure(
    runs: TaskRuns,
    task: str,
    *,
    cost: CostFit | None = None,
    accuracy: AccuracyFit | None = None,
    held_out: Sequence[HeldOutScore] = (),
    budgets: Sequence[float] = (),
) -> "Figure":
    """Draw accuracy over compute, cost over compute, and accuracy over cost, with fits as far as there are any.

    Args:
        runs: The runs with their scores.
        task: Name of the task.
        cost: First stage of a prediction.
        accuracy: Second stage of it.
        held_out: Runs that tested the prediction; they are marked.
        budgets: Budgets to predict; they are marked. FLOPs.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = new_figure(13.5, 4.3)
    left, middle, right = figure.subplots(1, 3)
    ends = runs.flops.min() / 1.5, max([runs.flops.max(), *budgets]) * 1.5
    flops = np.geomspace(*ends, _LINE)
    costs = None if cost is None else np.stack([cost.samples(one) for one in flops], axis=1)
    accuracies = None
    if costs is not None and accuracy is not None:
        accuracies = np.stack([accuracy.samples(column) for column in costs.T], axis=1)
    for axes, values, lines, name in (
        (left, runs.accuracy, accuracies, runs.metric),
        (middle, runs.cost, costs, _UNITS.get(runs.cost_name, runs.cost_name)),
    ):
        if lines is not None:
            _band(axes, flops, lines)
        axes.plot(runs.flops, values, "o", color=_BLUE, markersize=5, zorder=4)
        axes.set(xscale="log", xlabel="training FLOPs", ylabel=name, xlim=ends)
        if ends[1] > 30 * ends[0]:
            axes.xaxis.set_minor_formatter("")
    _errors(left, runs.flops, runs)
    if accuracy is not None:
        lowest = float(runs.cost.min()) if costs is None else min(float(costs[0].min()), float(runs.cost.min()))
        at = np.linspace(lowest * 0.98, float(runs.cost.max()) * 1.02, _LINE)
        sigmoid = np.stack([accuracy.samples(np.full(len(accuracy.theta), one)) for one in at], axis=1)
        _band(right, at, sigmoid)
    right.plot(runs.cost, runs.accuracy, "o", color=_BLUE, markersize=5, zorder=4)
    right.set(xlabel=_UNITS.get(runs.cost_name, runs.cost_name), ylabel=runs.metric)
    right.invert_xaxis()
    _errors(right, runs.cost, runs)
    _mark(left, middle, right, held_out)
    _predict(left, middle, cost, accuracy, budgets)
    for axes, title in (
        (left, f"{task}: accuracy over compute"),
        (middle, "The same runs: cost of right answers"),
        (right, "Accuracy over cost"),
    ):
        plain(axes, title)
    return figure


def _band(axes: "Axes", at: FloatArray, samples: FloatArray) -> None:
    """Draw an estimate with the 95 % interval of its bootstraps."""
    axes.plot(at, samples[0], color=_BLUE, linewidth=1.4, zorder=3)
    if len(samples) > 1:
        low, high = np.nanquantile(samples[1:], [0.025, 0.975], axis=0)
        axes.fill_between(at, low, high, color=_BLUE, alpha=0.15, linewidth=0)


def _errors(axes: "Axes", at: FloatArray, runs: TaskRuns) -> None:
    """Draw the measured accuracies' 95 % errors, and the level of chance."""
    half = 1.96 * runs.standard_errors
    axes.vlines(at, np.maximum(runs.accuracy - half, 0), np.minimum(runs.accuracy + half, 1), color=_BLUE, linewidth=1)
    if runs.chance:
        axes.axhline(runs.chance, color=_GREY, linewidth=1.2)
        place = (1, runs.chance)
        axes.annotate(
            "chance", place, xycoords=axes.get_yaxis_transform(), xytext=(-2, -9), textcoords="offset points",
            color=_GREY, fontsize=9, ha="right",
        )  # fmt: skip


def _mark(left: "Axes", middle: "Axes", right: "Axes", held_out: Sequence[HeldOutScore]) -> None:
    """Put a ring around each held-out run, and draw the interval of its prediction beside it."""
    for index, run in enumerate(held_out):
        for axes, place, predicted in (
            (left, (run.flops, run.accuracy), run.predicted),
            (middle, (run.flops, run.cost), run.predicted_cost),
            (right, (run.cost, run.accuracy), None),
        ):
            axes.plot(*place, "o", markersize=10, markerfacecolor="none", markeredgecolor=_ACCENT, zorder=5)
            if predicted is not None:
                _star(axes, run.flops, predicted)
            if not index:
                label(axes, "held out", place, _ACCENT, shift=(-9, -11 if axes is middle else 9), align="right")


def _predict(
    left: "Axes", middle: "Axes", cost: CostFit | None, accuracy: AccuracyFit | None, budgets: Sequence[float]
) -> None:
    if cost is None:
        return
    for flops in budgets:
        costs = cost.predict(flops)
        _star(middle, flops, costs)
        label(middle, f"{costs.value:.3g}", (flops, costs.value), _ACCENT, shift=(0, 14), align="center")
        if accuracy is not None:
            found = accuracy.from_compute(cost, flops)
            _star(left, flops, found)
            label(left, f"{found.value:.3g}", (flops, found.value), _ACCENT, shift=(0, 14), align="center")


def _star(axes: "Axes", at: float, estimate: Estimate) -> None:
    axes.plot([at, at], [estimate.low, estimate.high], color=_ACCENT, linewidth=1.3, zorder=4)
    axes.plot(at, estimate.value, "*", color=_ACCENT, markeredgecolor=INK, markeredgewidth=0.3, markersize=11, zorder=6)

"""Accuracy against generated tokens: what more samples, votes and longer reasoning buy, as data and as a figure."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lm.evals.statistics import Score
from lightning_lm.storage import replacing

if TYPE_CHECKING:
    from lightning_lm.evals.results import Results, TaskResults

__all__ = ["CurvePoint", "compute_curve", "save_curve"]

_SAMPLED = re.compile(r"(.+_(?:pass|maj|best|weighted))@(\d+)")
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """A score and its price.

    Args:
        line: Name of the line that it belongs to: task and metric, without the number of samples or the budget.
        tokens: Mean number of generated tokens of a question.
        score: The score.
    """

    line: str
    tokens: float
    score: Score


def compute_curve(tasks: "Iterable[TaskResults]") -> list[CurvePoint]:
    """Return the scores of tasks that are answered by text, with their tokens, line by line.

    ``NAME_maj@k`` and the like cost ``k`` completions. Tasks that differ in the budget of reasoning, named
    ``TASK@512``, make a line of their main metrics.

    Args:
        tasks: Results of tasks; those without ``tokens`` are passed over.
    """
    points = []
    for task in tasks:
        tokens = task.scores.get("tokens")
        if tokens is None:
            continue
        name, _, budget = task.name.partition("@")
        if budget:
            points.append(
                CurvePoint(f"{name}, {task.main_metric}", tokens.value * _samples(task.main_metric), task.main)
            )
        for metric, score in task.scores.items():
            sampled = _SAMPLED.fullmatch(metric)
            if sampled is not None:
                points.append(CurvePoint(f"{task.name}, {sampled[1]}", tokens.value * int(sampled[2]), score))
    return sorted(points, key=lambda point: (point.line, point.tokens))


def _samples(metric: str) -> int:
    sampled = _SAMPLED.fullmatch(metric)
    return 1 if sampled is None else int(sampled[2])


def save_curve(results: "Results", path: Path | str) -> Path:
    """Draw accuracy against generated tokens, with 95 % intervals, and return the path.

    Args:
        results: The results.
        path: File to write; its ending decides the format.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    from lightning_lm.scaling.plots.canvas import INK, new_figure, plain

    lines: dict[str, list[CurvePoint]] = {}
    for point in compute_curve(results.tasks):
        lines.setdefault(point.line, []).append(point)
    figure = new_figure(7.0, 4.5)
    axes = figure.add_subplot()
    plain(axes, "Accuracy against generated tokens")
    for number, (name, points) in enumerate(lines.items()):
        colour, style = _COLOURS[number % len(_COLOURS)], "-" if number < len(_COLOURS) else "--"
        tokens, values = [point.tokens for point in points], [point.score.value for point in points]
        low, high = [point.score.low for point in points], [point.score.high for point in points]
        axes.fill_between(tokens, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(tokens, values, style, marker="o", color=colour, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("generated tokens of a question", color=INK)
    if lines:
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "no task with several samples or budgets", ha="center", transform=axes.transAxes)
    path = Path(path)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=150)
    return path

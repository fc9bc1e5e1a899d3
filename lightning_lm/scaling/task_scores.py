"""Scores on tasks in a ledger of runs, as columns for a prediction."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN, FloatArray, Points
from lightning_lm.scaling.fits.task_runs import TaskRuns
from lightning_lm.scaling.flop_conventions import check_convention
from lightning_lm.scaling.ledger import RunRecord

__all__ = ["task_runs_of", "tasks_in"]

_COSTS = ("gold_bits_per_byte", "bits_per_byte", "gold_logprob")
"""Costs of right answers, or what gives them, in the order of preference."""


def tasks_in(records: Sequence[RunRecord]) -> dict[str, int]:
    """Return the number of finished runs with scores of each task.

    Args:
        records: Records of a ledger.
    """
    counts: dict[str, int] = {}
    for record in records:
        for name in record.tasks if record.finished else ():
            counts[name] = counts.get(name, 0) + 1
    return counts


def task_runs_of(
    records: Sequence[RunRecord],
    task: str,
    *,
    metric: str | None = None,
    cost: str | None = None,
    chance: float | None = None,
    ceiling: float = 1.0,
    convention: str = "products",
    all_sizes: bool = False,
) -> TaskRuns:
    """Return the finished runs with scores of a task: of each budget those of the size with the lowest cost.

    Args:
        records: Records of a ledger.
        task: Name of the task.
        metric: Metric from 0 to 1 to predict; by default the task's main one.
        cost: Metric that is the cost of right answers, or ``loss`` for the loss of the run; by default
            ``gold_bits_per_byte`` or the like if all runs have it, else ``loss``. ``gold_logprob`` is negated.
        chance: Accuracy of random answers; by default the one that was recorded.
        ceiling: Accuracy of a perfect model.
        convention: Convention of counting FLOPs.
        all_sizes: Return the runs of every size of a budget; the cost is then no function of compute alone.

    Raises:
        ConfigurationError: If no run has scores of the task, or some lack the metric or the cost.
        DataError: If the values cannot be predicted from.
    """
    check_convention(convention)
    chosen = [one for one in records if one.finished and task in one.tasks and convention in one.flops_per_token]
    if not chosen:
        known = tasks_in(records)
        there = ", ".join(f"{name} ({count} runs)" for name, count in known.items())
        raise ConfigurationError(
            f"No finished run has scores of the task {task!r}. The ledger has {there or 'no scores of tasks'}. Train "
            "with ScalingLaw and Evaluate, or add results: lightning-lm scaling score LEDGER RESULTS.json --run NAME."
        )
    summaries = [one.tasks[task] for one in chosen]
    wanted = metric or str(summaries[-1].get("metric"))
    source = cost or next((name for name in _COSTS if all(name in one["scores"] for one in summaries)), "loss")
    chances = sorted({float(one.get("chance", 0.0)) for one in summaries})
    if chance is None and len(chances) > 1 and chances[-1] - chances[0] > 1e-6:
        raise DataError(f"Runs of {task} have different levels of chance, {chances}: other items. Give one: --chance.")
    pairs = list(zip(chosen, summaries, strict=True))
    costs = np.array([_cost(*pair, source, task) for pair in pairs])
    if not all_sizes:
        kept = _best_sizes(chosen, costs, convention)
        chosen, costs, pairs = [chosen[i] for i in kept], costs[kept], [pairs[i] for i in kept]
    return TaskRuns(
        flops=np.array([one.flops(convention) for one in chosen]),
        cost=costs,
        accuracy=np.array([_metric(*pair, wanted, task) for pair in pairs]),
        num_items=np.array([float(one.get("num_items", 0)) for _, one in pairs]),
        chance=chances[0] if chance is None else chance,
        ceiling=ceiling,
        names=[one.name or one.id for one in chosen],
        metric=wanted,
        cost_name=source,
    )


def _best_sizes(records: Sequence[RunRecord], costs: FloatArray, convention: str) -> list[int]:
    """Return the indices of the runs of the size with the lowest mean cost at each budget."""
    sizes = np.array([one.flops_per_token[convention] / FLOPS_PER_PARAMETER_TOKEN for one in records])
    tokens = np.array([float(one.tokens) for one in records])
    order = np.lexsort((costs, tokens, sizes))  # as `Points` sorts its rows
    points = Points.of(sizes[order], tokens[order], costs[order])
    kept: list[int] = []
    for rows in points.by_budget():
        group = order[rows]
        best = min(np.unique(sizes[group]), key=lambda size: float(costs[group][sizes[group] == size].mean()))
        kept += group[sizes[group] == best].tolist()
    return sorted(kept)


def _metric(record: RunRecord, summary: Mapping[str, Any], name: str, task: str) -> float:
    value = summary["scores"].get(name)
    if value is None:
        raise ConfigurationError(
            f"The run {record.name or record.id} has no {name!r} of {task}; it has {', '.join(summary['scores'])}."
        )
    return float(value)


def _cost(record: RunRecord, summary: Mapping[str, Any], name: str, task: str) -> float:
    if name == "loss":
        return record.loss
    value = _metric(record, summary, name, task)
    return -value if name == "gold_logprob" else value

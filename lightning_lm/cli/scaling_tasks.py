"""The verbs ``lightning-lm scaling tasks`` and ``scaling score``: accuracy on tasks, predicted from smaller runs."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lm.cli.numbers import COUNT, POSITIVE, UP_TO_ONE, WHOLE, Number
from lightning_lm.errors import DataError
from lightning_lm.parts import Limit
from lightning_lm.scaling.report import Report, interval, new_table, number, significant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_lm.scaling import AccuracyFit, CostFit, HeldOutScore, RunRecord, TaskRuns

__all__ = ["add_arguments", "add_score", "predict_tasks"]

_FAR = 100.0
_WIDTH = 78
"""Columns of a table, whose notes are broken at its width."""
_BELOW_ONE = Number(Limit.BELOW_ONE)


def add_arguments(verbs: Any) -> None:
    """Declare the verbs.

    Args:
        verbs: The subparsers of ``lightning-lm scaling``.
    """
    tasks = verbs.add_parser("tasks", help="predict accuracy on a task by way of the cost of right answers")
    tasks.add_argument("ledger", type=Path, metavar="LEDGER", help="of runs with ScalingLaw and Evaluate")
    tasks.add_argument("--task", metavar="NAME", help="default: the only one")
    tasks.add_argument("--metric", metavar="NAME", help="accuracy to predict (default: the task's main metric)")
    tasks.add_argument("--cost", metavar="NAME", help="cost of right answers (default: gold_bits_per_byte, else loss)")
    chance = tasks.add_mutually_exclusive_group()
    chance.add_argument("--chance", type=_BELOW_ONE, metavar="P", help="accuracy of random answers (default: recorded)")
    chance.add_argument("--choices", type=COUNT, metavar="N", help="number of choices, of which one is right")
    tasks.add_argument("--ceiling", type=UP_TO_ONE, default=1.0, metavar="P", help="best accuracy (%(default)s)")
    tasks.add_argument("--all-sizes", action="store_true", help="fit every run, not the best size of each budget alone")
    tasks.add_argument("--hold-out", type=WHOLE, default=1, metavar="N", help="largest runs that test it (%(default)s)")
    tasks.add_argument("--predict-flops", type=POSITIVE, nargs="+", default=[], metavar="FLOPS", help="budgets")
    tasks.add_argument("--plot", type=Path, metavar="FOLDER", help="write a figure and report.md there")
    tasks.add_argument("--output", type=Path, metavar="FILE", help="write JSON")
    score = verbs.add_parser("score", help="add results of `evaluate` to a run of a ledger")
    score.add_argument("ledger", type=Path, metavar="LEDGER", help="with the run")
    score.add_argument("results", type=Path, metavar="RESULTS", help="what `lightning-lm evaluate --output` wrote")
    score.add_argument("--run", required=True, metavar="NAME", help="name or id of the run")


def add_score(arguments: argparse.Namespace, records: "Sequence[RunRecord]") -> None:
    """Add results of an evaluation to a run.

    Args:
        arguments: Parsed arguments of ``score``.
        records: Runs of the ledger.

    Raises:
        DataError: If no run or several have the name, or the results cannot be read.
    """
    from lightning_lm.evals.results import Results
    from lightning_lm.scaling import RunLedger

    found = [record for record in records if arguments.run in (record.name, record.id)]
    if len({record.id for record in found}) != 1:
        known = ", ".join(f"{record.name or '(no name)'} ({record.id})" for record in (found or records)[:10])
        raise DataError(f"{len(found)} runs of {arguments.ledger} are called {arguments.run!r}. Give an id: {known}.")
    results = Results.load(arguments.results)
    RunLedger(arguments.ledger).add_scores(found[0].id, {task.name: task.summary for task in results.tasks})
    print(
        f"{found[0].name or found[0].id}: {', '.join(task.name for task in results.tasks)} added to {arguments.ledger}."
    )


def predict_tasks(arguments: argparse.Namespace, records: "Sequence[RunRecord]") -> None:
    """Fit both stages, test them on held-out runs, and predict.

    Args:
        arguments: Parsed arguments of ``tasks``.
        records: Runs of the ledger.

    Raises:
        LightningLMError: If there are no scores, or too few.
    """
    from lightning_lm.scaling import fit_accuracy, fit_cost, hold_out_scores, tasks_in

    task, runs = _runs(arguments, records)
    report = Report(f"{task} over compute, {arguments.ledger}")
    report.table(_run_table(runs, task, tasks_in(records)[task]))
    draws = arguments.bootstraps
    cost, accuracy, reasons, unusable = None, None, dict[str, str](), None
    try:
        cost = fit_cost(runs, num_bootstraps=draws)
        accuracy = fit_accuracy(runs, num_bootstraps=draws)
    except DataError as error:
        reasons["accuracy" if cost else "cost"] = str(error)
        unusable = None if cost else error
        if cost:
            report.say(f"No prediction of {runs.metric}: {error}")
    held: list[HeldOutScore] = []
    if arguments.hold_out and cost is not None:
        try:
            held = hold_out_scores(runs, arguments.hold_out, num_bootstraps=draws)
            report.table(_held_table(held, runs))
        except DataError as error:
            reasons["held_out"] = str(error)
            report.say(f"No hold-out test: {error}")
    if cost is not None:
        _say_fits(report, runs, cost, accuracy, arguments.predict_flops)
    if arguments.plot is not None:
        from lightning_lm.scaling.plots.fits import write_figures
        from lightning_lm.scaling.plots.tasks import task_figure

        figure = task_figure(runs, task, cost=cost, accuracy=accuracy, held_out=held, budgets=arguments.predict_flops)
        written = write_figures(arguments.plot, {"task": figure})
        print(f"Report: {report.write(arguments.plot, arguments.command_line, written)}, with {written[0].name}")
    if arguments.output is not None:
        _save(arguments, task, runs, (cost, accuracy, held), reasons)
    if unusable is not None:
        raise unusable


def _runs(arguments: argparse.Namespace, records: "Sequence[RunRecord]") -> "tuple[str, TaskRuns]":
    from lightning_lm.scaling import task_runs_of, tasks_in

    known = tasks_in(records)
    if arguments.task is None and len(known) > 1:
        raise DataError(f"The ledger has scores of {', '.join(known)}; name one with --task.")
    task = arguments.task or next(iter(known), "")
    chance = arguments.chance if arguments.choices is None else 1 / arguments.choices
    runs = task_runs_of(
        records,
        task,
        metric=arguments.metric,
        cost=arguments.cost,
        chance=chance,
        ceiling=arguments.ceiling,
        convention=arguments.convention,
        all_sizes=arguments.all_sizes,
    )
    return task, runs


def _run_table(runs: "TaskRuns", task: str, num_scored: int) -> Any:
    table = new_table(f"{task}: {len(runs)} runs", "run", "FLOPs", runs.cost_name, runs.metric, "SE", "items")
    others = num_scored - len(runs)
    notes = [f"Chance: {significant(runs.chance)}."] if runs.chance else []
    if others:
        notes.append(f"{others} runs of other sizes than the best of their budget are not used (--all-sizes).")
    table.caption = "\n".join(notes) or None
    for index, error in enumerate(runs.standard_errors):
        table.add_row(
            str(runs.names[index])[:36], f"{runs.flops[index]:.3g}", significant(runs.cost[index]),
            f"{runs.accuracy[index]:.3f}", f"{error:.3f}", f"{runs.num_items[index]:,.0f}",
        )  # fmt: skip
    return table


def _held_table(held: "Sequence[HeldOutScore]", runs: "TaskRuns") -> Any:
    table = new_table(
        "Held out: fitted without these, then asked for them",
        "FLOPs", "", "measured", "predicted", "95 % of runs", "error",
    )  # fmt: skip
    for one in held:
        inside = "" if one.cost in one.predicted_cost else "\n(outside)"
        error = f"{one.predicted_cost.value / one.cost - 1:+.2%}"
        table.add_row(
            f"{one.flops:.3g}", runs.cost_name, significant(one.cost), number(one.predicted_cost),
            interval(one.predicted_cost) + inside, error,
        )  # fmt: skip
        for name, found in ((runs.metric, one.predicted), ("  by its own cost", one.from_cost)):
            if found is not None:
                inside = "" if one.accuracy in found else "\n(outside)"
                points = f"{100 * (found.value - one.accuracy):+.1f} points"
                table.add_row("", name, f"{one.accuracy:.3f}", number(found), interval(found) + inside, points)
    return table


def _say_fits(
    report: Report, runs: "TaskRuns", cost: "CostFit", accuracy: "AccuracyFit | None", budgets: "Sequence[float]"
) -> None:
    table = new_table("Both stages", "parameter", "value", "95 % interval")
    table.min_width = _WIDTH
    for fit in (cost, accuracy):
        for name, estimate in fit.values.items() if fit is not None else ():
            table.add_row(name, significant(estimate.value), interval(estimate))
    table.caption = (
        "cost = E + K / C^g; accuracy = chance + (ceiling - chance) sigmoid((cost_0 - cost) / width)"
        f"\nchance {significant(runs.chance)}, ceiling {significant(runs.ceiling)}"
    )
    report.table(table)
    for fit in (cost, accuracy):
        for finding in fit.findings if fit is not None else ():
            report.say(f"Note: {finding}")
    if not budgets:
        return
    table = new_table("Predicted, with 95 % intervals of the laws", "FLOPs", runs.cost_name, "", runs.metric, "")
    for flops in budgets:
        first = cost.predict(flops)
        second = None if accuracy is None else accuracy.from_compute(cost, flops)
        cells = ("-", "") if second is None else (number(second), interval(second))
        table.add_row(f"{flops:.3g}", number(first), interval(first), *cells)
    if (far := max(budgets) / runs.flops.max()) > _FAR:
        table.caption = f"Beware: {far:.0e} times the largest budget that was measured."
    report.table(table)


def _save(
    arguments: argparse.Namespace,
    task: str,
    runs: "TaskRuns",
    found: "tuple[CostFit | None, AccuracyFit | None, Sequence[HeldOutScore]]",
    reasons: dict[str, str],
) -> None:
    from lightning_lm.evals.results import plain_json
    from lightning_lm.storage import replacing

    cost, accuracy, held = found
    names = ("flops", "cost", "accuracy", "num_items")
    columns = {"name": runs.names, **{name: getattr(runs, name).tolist() for name in names}}
    predictions = [
        {
            "flops": flops,
            "cost": None if cost is None else cost.predict(flops)._asdict(),
            "accuracy": None if cost is None or accuracy is None else accuracy.from_compute(cost, flops)._asdict(),
        }
        for flops in arguments.predict_flops
    ]
    content = {
        "format": 1,
        "task": task,
        **{name: getattr(runs, name) for name in ("metric", "cost_name", "chance", "ceiling")},
        "runs": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        "cost_fit": None if cost is None else {name: one._asdict() for name, one in cost.values.items()},
        "accuracy_fit": None if accuracy is None else {name: one._asdict() for name, one in accuracy.values.items()},
        "findings": [text for fit in (cost, accuracy) if fit is not None for text in fit.findings],
        "refused": reasons,
        "held_out": [
            {**one._asdict(), "error": one.error}
            | {name: value._asdict() for name, value in one._asdict().items() if hasattr(value, "_asdict")}
            for one in held
        ],
        "predictions": predictions,
    }
    with replacing(arguments.output) as file:
        file.write((json.dumps(plain_json(content), indent=1) + "\n").encode())
    print(f"Result: {arguments.output}")

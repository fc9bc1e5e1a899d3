"""Results of an evaluation for the eye: tables that fit into 80 columns, and a figure of scores with intervals."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_lm.evals.results import Results, TaskResults
from lightning_lm.evals.statistics import PairedDifference, Score
from lightning_lm.storage import replacing

__all__ = ["comparison_table", "interval_text", "number_text", "results_table", "save_figure", "score_table"]

_COLOUR = "#2563eb"
_CHANCE = "#9ca3af"


def results_table(results: Results, *, subjects: bool = True) -> Table:
    """Return a table of the scores: one line a metric, and one a subject for the main metric.

    Args:
        results: The results.
        subjects: Show the subjects of each task.
    """
    table = score_table(results.model.get("checkpoint", results.model.get("model", "")))
    table.add_column("task, metric", overflow="fold")
    for name in ("value", "SE", "95 % interval", "chance", "items"):
        table.add_column(name, justify="right", no_wrap=True)
    for task in results.tasks:
        chance = number_text(task.chance) if task.chance else ""
        table.add_row(Text(f"{task.name}, {task.main_metric}"), *_cells(task.main, chance))
        for metric, score in task.scores.items():
            if metric != task.main_metric:
                table.add_row(Text(f"  {metric}"), *_cells(score))
        parts = {} if task.contamination is None else task.contamination.scores
        named = [(f"of {subject}", scores) for subject, scores in task.subjects.items() if subjects]
        for name, scores in [*named, *((f"of {part} items", scores) for part, scores in parts.items())]:
            if task.main_metric in scores:
                table.add_row(Text(f"  {name}"), *_cells(scores[task.main_metric]))
        table.add_section()
    if results.core is not None:
        cells = _cells(results.core, number_text(0.0))[:-1]
        table.add_row(Text("CORE: mean of centred accuracies"), *cells, f"{results.core.num_items} tasks")
    notes = [note for task in results.tasks for note in _notes(task)]
    table.caption = "\n".join(notes) or None
    return table


def comparison_table(
    differences: Mapping[str, Mapping[str, PairedDifference]], first: Results, second: Results
) -> Table:
    """Return a table of paired differences, first minus second.

    Args:
        differences: Result of `compare_results`.
        first: Results of the first model.
        second: Results of the second model.
    """
    table = score_table("First minus second, on the same items")
    table.add_column("task, metric", overflow="fold")
    for name in ("first", "second", "difference", "95 % interval", "p", "McNemar"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, metrics in differences.items():
        for metric, found in metrics.items():
            values = (number_text(results[task].scores[metric].value) for results in (first, second))
            exact = "" if found.mcnemar_p_value is None else f"{found.mcnemar_p_value:.2g}"
            table.add_row(
                Text(f"{task}, {metric}"), *values, _signed(found.value), interval_text(found, _signed),
                f"{found.p_value:.2g}", exact,
            )  # fmt: skip
    table.caption = "p: paired bootstrap, two-sided. McNemar: exact test of independent items, right or wrong."
    return table


def save_figure(results: Results, path: Path | str) -> Path:
    """Draw the main score of each task with its 95 % interval and the level of chance, and return the path.

    Args:
        results: The results.
        path: File to write; its ending decides the format.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    rows = list(_rows(results.tasks))
    from lightning_lm.scaling.plots.canvas import INK, new_figure, plain

    figure = new_figure(7.0, 1.2 + 0.3 * len(rows))
    axes = figure.add_subplot()
    plain(axes, "Scores with 95 % intervals")
    for place, (_, score, chance) in enumerate(rows):
        axes.plot([score.low, score.high], [place, place], color=_COLOUR, linewidth=2)
        axes.plot([score.value], [place], "o", color=_COLOUR)
        if chance:
            axes.plot([chance, chance], [place - 0.35, place + 0.35], color=_CHANCE, linewidth=2)
        right = score.high if math.isfinite(score.high) else score.value
        axes.annotate(
            number_text(score.value), (right, place), xytext=(6, 0), textcoords="offset points", va="center", color=INK
        )
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if any(chance for *_, chance in rows):
        axes.set_xlabel("grey: chance")
    axes.margins(x=0.12)
    path = Path(path)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=150)
    return path


def _rows(tasks: Iterable[TaskResults]) -> Iterable[tuple[str, Score, float]]:
    for task in tasks:
        yield f"{task.name}: {task.main_metric}", task.main, task.chance


def score_table(title: str) -> Table:
    """Return an empty table.

    Args:
        title: Text above it.
    """
    return Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")


def _cells(score: Score, chance: str = "") -> tuple[str, ...]:
    error = f"{score.standard_error:.2g}" if math.isfinite(score.standard_error) else "-"
    return number_text(score.value), error, interval_text(score, number_text), chance, f"{score.num_items:,}"


def interval_text(score: Score | PairedDifference, number: Callable[[float], str]) -> str:
    """Return the 95 % interval of a score as text.

    Args:
        score: The score.
        number: Writes a number.
    """
    return f"{number(score.low)} to {number(score.high)}" if math.isfinite(score.low) else "-"


def number_text(value: float) -> str:
    """Return a score with three decimals, or four digits if it is large.

    Args:
        value: The score.
    """
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.4g}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _notes(task: TaskResults) -> Iterable[str]:
    overlap = task.contamination
    if overlap is not None:
        yield (
            f"{task.name}: {len(overlap.overlaps)} of {len(task.items) - len(overlap.skipped)} items share "
            f"{overlap.ngram} words with one of {overlap.num_documents:,} documents."
        )
    if task.num_dropped:
        yield f"{task.name}: examples left out of {task.num_dropped} of {len(task.items)} prompts, to fit the context."
    if task.num_truncated:
        yield f"{task.name}: the beginning of {task.num_truncated} of {len(task.items)} prompts was cut."

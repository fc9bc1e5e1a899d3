"""The report of a road as a page: costs, scores, curves of each stage, and samples on the same prompts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lm.cli.road.progress import clock
from lightning_lm.html_report import (
    Bar,
    Html,
    Series,
    bar_chart,
    code,
    element,
    figures,
    line_chart,
    page,
    prose,
    readable,
    section,
    table,
    tiles,
)

__all__ = ["report_page"]

_CHARTS = (
    ("Loss", "nats per token", ("train/loss", "val/loss")),
    ("Bits per byte", "validation text", ("val/bits_per_byte",)),
    ("Reward", "mean of the completions", ("train/reward",)),
    ("Held-out task", "pass@1", ("val/pass@1",)),
    ("Token accuracy", "of target tokens", ("train/token_accuracy", "val/token_accuracy")),
    ("Preferred completion is likelier", "fraction of pairs", ("train/rewards/accuracies", "val/rewards/accuracies")),
    ("Reward margin", "chosen - rejected", ("train/rewards/margins", "val/rewards/margins")),
    ("Entropy", "nats per token", ("train/entropy",)),
    ("Length of completions", "tokens", ("train/completions/mean_length",)),
)
"""Charts of a stage: title, unit, and logged names, of which at least one is there."""
_MOST_CHARTS = 6
_SMOOTHED_FROM = 30
_MEBI = 2**20


def report_page(report: Mapping[str, Any]) -> Html:
    """Return the page of a report.

    Args:
        report: Content of ``report.json``.
    """
    stages, totals = report["stages"], report["totals"]
    facts: list[tuple[str, Any]] = [
        ("wall time", clock(totals["wall_s"])),
        ("CPU time", f"{totals['cpu_s']:,.0f} s"),
        ("tokens read", _short(totals["num_tokens"])),
        ("peak memory", f"{totals['memory_bytes'] / _MEBI:,.0f} MiB"),
    ]
    facts += [(_short_name(name), text) for name in report["metrics"] if (text := _change(name, _scored(report)))]
    return page(
        report["title"],
        tiles(facts),
        _scores(report),
        _samples(report),
        *(_stage(stage) for stage in stages),
        _costs(report),
        _further(report),
        subtitle=f"{len(stages)} stages, {report['time']}, {report['machine']}.",
        footer=f"{report['command']} | lightning-lm {report['version']}",
    )


def _scored(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Return the scores of every measured model by its name, in order."""
    found = [("untrained", report["untrained"]["scores"])]
    found += [(stage["name"], stage["scores"]) for stage in report["stages"]]
    return [(name, scores) for name, scores in found if scores]


def _change(metric: str, scored: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    values = [scores[metric] for _, scores in scored if metric in scores]
    return f"{readable(values[0])} → {readable(values[-1])}" if values else ""


def _scores(report: Mapping[str, Any]) -> Html:
    scored, metrics = _scored(report), report["metrics"]
    if not scored:
        return Html()
    rows = [
        [f"after {name}" if name != "untrained" else name, *(scores.get(m) for m in metrics)] for name, scores in scored
    ]
    return section(
        "Scores after each stage",
        prose("Each checkpoint is measured on the same held-out text and tasks."),
        table(["model", *map(_short_name, metrics)], rows),
        figures(*(_bars(metric, rows, column) for column, metric in enumerate(metrics, start=1))),
    )


def _bars(metric: str, rows: Sequence[Sequence[Any]], column: int) -> Html:
    measured = [Bar(row[0], row[column]) for row in rows if row[column] is not None and math.isfinite(row[column])]
    return bar_chart(_short_name(metric), measured) if all(bar.value >= 0 for bar in measured) else Html()


def _samples(report: Mapping[str, Any]) -> Html:
    found = [("untrained", report["untrained"]["samples"])]
    found += [(f"after {stage['name']}", stage["samples"]) for stage in report["stages"]]
    found = [(name, samples) for name, samples in found if samples]
    if not found:
        return Html()
    blocks: list[Html] = []
    for index, prompt in enumerate(report["prompts"]):
        rows = [[name, _sample(prompt, samples[index])] for name, samples in found if index < len(samples)]
        blocks.append(table(["model", f"continuation of prompt {index + 1}"], rows))
    return section("Samples on the same prompts", *blocks)


def _sample(prompt: str, text: str) -> Html:
    return element("code", element("b", prompt), text)


def _stage(stage: Mapping[str, Any]) -> Html:
    resumed = f", in {stage['attempts']} attempts" if stage["attempts"] > 1 else ""
    cost = (
        f"{clock(stage['wall_s'])} (min:s), {stage['cpu_s']:,.0f} CPU-seconds, {stage['memory_bytes'] / _MEBI:,.0f} MiB"
    )
    status = "" if stage["status"] == "finished" else f"{stage['status']}; "
    return section(f"Stage: {stage['name']}", prose(f"{status}{cost}{resumed}"), code(stage["command"]), _charts(stage))


def _charts(stage: Mapping[str, Any]) -> Html:
    curves = stage["curves"]
    has_reward = "train/reward" in curves  # then the loss is a surrogate that says nothing of progress
    charts = []
    for title, unit, names in _CHARTS:
        present = [name for name in names if name in curves]
        if present and not (title == "Loss" and has_reward):
            charts.append(line_chart(title, _series(present, curves), x_label="step", y_label=unit))
    return figures(*charts[:_MOST_CHARTS]) if charts else Html()


def _series(names: Sequence[str], curves: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Series]:
    series = []
    for colour, name in enumerate(names):
        steps, values = curves[name]["steps"], curves[name]["values"]
        if len(values) >= _SMOOTHED_FROM:
            series.append(Series(name, steps, values, faint=True, colour=colour))
            values = _smoothed(values)
        series.append(Series(name, steps, values, colour=colour))
    return series


def _smoothed(values: Sequence[float], width: int = 4) -> list[float]:
    """Return the mean of each value and of up to ``width`` neighbours on either side, as many on both."""
    means = []
    for index in range(len(values)):
        reach = min(width, index, len(values) - 1 - index)
        near = [value for value in values[index - reach : index + reach + 1] if math.isfinite(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _costs(report: Mapping[str, Any]) -> Html:
    rows: list[list[Any]] = [
        [
            stage["name"],
            clock(stage["wall_s"]),
            round(stage["cpu_s"]),
            stage["num_tokens"],
            round(stage["memory_bytes"] / _MEBI),
        ]
        for stage in report["stages"]
    ]
    measuring = [(stage["measuring_wall_s"], stage["measuring_cpu_s"]) for stage in report["stages"]]
    rows.append(
        ["scores and samples", clock(sum(w for w, _ in measuring)), round(sum(c for _, c in measuring)), None, None]
    )
    totals = report["totals"]
    rows.append(
        [
            "all",
            clock(totals["wall_s"]),
            round(totals["cpu_s"]),
            totals["num_tokens"],
            round(totals["memory_bytes"] / _MEBI),
        ]
    )
    return section("Costs", table(["stage", "wall time", "CPU-seconds", "tokens read", "peak MiB"], rows))


def _further(report: Mapping[str, Any]) -> Html:
    trained = [stage for stage in report["stages"] if stage["checkpoint"]]
    if not trained:
        return Html()
    last = trained[-1]
    prompt = (report["prompts"] or [""])[-1]
    lines = [f"lightning-lm generate --checkpoint {report['output']}/runs/{last['name']} --prompt {prompt!r}"]
    blocks = [prose("Talk to the last model:"), code("\n".join(lines))]
    if last["score_commands"]:
        blocks += [prose("Measure it again:"), code("\n".join(last["score_commands"]))]
    return section("What to type next", *blocks)


def _short_name(metric: str) -> str:
    """Return a logged name without the stage of the Trainer: all scores are of held-out data."""
    return metric.removeprefix("val/")


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"

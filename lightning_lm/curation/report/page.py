"""The report as a self-contained page: the funnel, distributions with their limits, samples, pairs of duplicates."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lm.curation.report.report import Histogram, Report, StepReport
from lightning_lm.html_report import (
    Bar,
    Html,
    bar_chart,
    code,
    element,
    figures,
    histogram,
    page,
    prose,
    section,
    table,
    tiles,
)

__all__ = ["report_page"]

_SHOWN = 700
_Sample = Mapping[str, Any]


def report_page(report: Report) -> str:
    """Return the page.

    Args:
        report: The report.
    """
    kept = report.documents_kept / max(1, report.documents_read)
    facts: list[tuple[str, object]] = [
        ("documents read", report.documents_read),
        ("documents kept", report.documents_kept),
        ("kept", f"{kept:.1%}"),
        ("MB read", report.bytes_read / 1e6),
        ("MB kept", report.bytes_kept / 1e6),
        ("left out unread", sum(report.unreadable.values())),
    ]
    return page(
        "Curation",
        tiles(facts),
        _funnel(report),
        _unreadable(report),
        *(_step(step) for step in report.steps),
        subtitle="Which documents came, which each step removed and why, and what is left",
        footer="Samples are drawn by the digests of the documents, so the same corpus always shows the same ones.",
    )


def _funnel(report: Report) -> Html:
    documents = [Bar("read", report.documents_read)]
    sizes = [Bar("read", report.bytes_read / 1e6)]
    for step in report.steps:
        documents.append(Bar(step.name, step.documents_out, _percent(step.documents_out, report.documents_read)))
        sizes.append(Bar(step.name, step.bytes_out / 1e6, _percent(step.bytes_out, report.bytes_read)))
    charts = figures(bar_chart("Documents after each step", documents), bar_chart("MB after each step", sizes))
    rows = [
        (
            step.name,
            step.documents_in,
            step.documents_out,
            _percent(step.documents_out, step.documents_in),
            step.bytes_in / 1e6,
            step.bytes_out / 1e6,
            step.changed,
            next((f"{rule} {count:,}" for rule, count in step.reasons.items()), "-"),
        )
        for step in report.steps
    ]
    columns = ("step", "in", "out", "kept", "MB in", "MB out", "changed", "most by")
    return section("Funnel", charts, table(columns, rows))


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _unreadable(report: Report) -> Html:
    rows = [
        (reason, count, "\n".join(": ".join(filter(None, example)) for example in report.examples[reason][:3]))
        for reason, count in report.unreadable.items()
    ]
    if not rows:
        return Html()
    return section("Left out unread", table(("reason", "records", "such as"), rows))


def _step(step: StepReport) -> Html:
    settings = ", ".join(f"{key}={value!r}" for key, value in step.settings.items() if key != "part")
    blocks: list[Html] = [prose(code(settings))] if settings else []
    removed = step.documents_in - step.documents_out
    blocks.append(
        prose(f"{step.documents_in:,} documents came, {removed:,} were removed and {step.changed:,} were changed.")
    )
    if step.counts:
        blocks.append(table(("counted", "number"), list(step.counts.items())))
    if step.histograms:
        charts = (_chart(name, found) for name, found in step.histograms.items())
        blocks.append(figures(*charts))
    blocks += [_rule(step, rule, samples) for rule, samples in step.removed.items()]
    return section(step.name, *blocks)


def _chart(name: str, found: Histogram) -> Html:
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", found.minimum), ("at most", found.maximum))
        if bound is not None
    ]
    return histogram(
        f"{name}{': ' if bounds else ''}{', '.join(bounds)}",
        found.counts,
        found.edges,
        x_label=f"median {found.median:g}",
        log_x=found.is_log,
        limits=[bound for bound in (found.minimum, found.maximum) if bound is not None],
    )


def _rule(step: StepReport, rule: str, samples: Sequence[_Sample]) -> Html:
    """Return ten removed documents of a rule beside ten that were kept, or pairs of duplicates side by side."""
    count = step.reasons.get(rule, 0)
    title = element("summary", f"{rule}: {count:,} removed, {step.reason_bytes.get(rule, 0) / 1e6:,.2f} MB")
    if any("kept" in sample for sample in samples):
        rows = [(_shown(sample), _shown(sample["kept"]), sample.get("value")) for sample in samples if "kept" in sample]
        return element("details", title, table(("removed", "kept in its place", "value"), rows))
    kept = [sample for sample in step.kept if rule in sample["measures"]] or list(step.kept)
    columns = ("removed", "value", "limit", "kept", "value")
    rows_of_rule = []
    for index in range(max(len(samples), len(kept))):
        gone = samples[index] if index < len(samples) else None
        stays = kept[index] if index < len(kept) else None
        left = (_shown(gone), gone.get("value"), gone.get("limit")) if gone else (Html(), "", "")
        right = (_shown(stays), stays["measures"].get(rule, "")) if stays else (Html(), "")
        rows_of_rule.append((*left, *right))
    return element("details", title, table(columns, rows_of_rule))


def _shown(sample: _Sample) -> Html:
    text = " ".join(str(sample["text"])[:_SHOWN].split())
    more = " ..." if int(sample["length"]) > _SHOWN else ""
    origin = sample.get("url") or str(sample.get("id", ""))[:8]
    return element("div", element("small", f"{origin}, {int(sample['length']):,} characters"), code(text + more))

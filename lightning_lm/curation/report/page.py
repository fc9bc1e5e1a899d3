"""The report as a self-contained page: the funnel, distributions with their limits, samples, clusters of duplicates."""

import difflib
import itertools
import re
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
    """Return ten removed documents of a rule beside ten that were kept, or clusters of duplicates side by side."""
    count = step.reasons.get(rule, 0)
    title = element("summary", f"{rule}: {count:,} removed, {step.reason_bytes.get(rule, 0) / 1e6:,.2f} MB")
    if any("kept" in sample for sample in samples):
        clusters = {sample["duplicate_of"]: sample for sample in reversed(samples) if "kept" in sample}
        return element("details", title, *(_cluster(sample) for sample in reversed(clusters.values())))
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


def _cluster(sample: _Sample) -> Html:
    """Return the document that was kept beside its copies, in which words that it does not have are marked."""
    copies = [sample, *sample.get("copies", ())]
    number = int(sample.get("num_copies", len(copies)))
    texts = [str(document["text"]) for document in (sample["kept"], *copies)]
    begin = _first_shown(texts)
    shown = [_excerpt(text, begin) for text in texts]
    blocks = [element("div", _origin(sample["kept"], "kept"), element("pre", shown[0]))]
    for copy, text in zip(copies, shown[1:], strict=True):
        words = _marked(texts[0][begin : begin + 2 * _SHOWN], text)
        blocks.append(element("div", _origin(copy, "removed"), element("pre", *words)))
    value = sample.get("value")
    more = f", {len(copies)} of them shown" if number > len(copies) else ""
    title = f"{number:,} cop{'y' if number == 1 else 'ies'} removed{more}{'' if value is None else f', {value}'}"
    return element("section", element("h3", title), figures(*blocks))


def _first_shown(texts: Sequence[str]) -> int:
    """Return where to begin, so that the first difference is in what is shown; 0 if there is none."""
    same = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))
    return same - _SHOWN // 3 if _SHOWN // 2 < same < min(map(len, texts)) else 0


def _excerpt(text: str, begin: int) -> str:
    """Return a part of a text, up to the end of a word."""
    part = text[begin : begin + _SHOWN]
    return part if len(text) <= begin + _SHOWN else re.sub(r"\S+\Z", "...", part)


def _marked(kept: str, text: str) -> list[Html | str]:
    """Return pieces of a text; those that differ from the text that was kept are marked."""
    words, others = re.findall(r"\s+|\S+", kept), re.findall(r"\s+|\S+", text.removesuffix("..."))
    changes = difflib.SequenceMatcher(None, words, others, autojunk=False).get_opcodes()
    pieces: list[Html | str] = []
    for kind, _, _, first, last in changes:
        piece = "".join(others[first:last])
        pieces.append(piece if kind == "equal" or not piece.strip() else element("mark", piece))
    return [*pieces, "..."] if text.endswith("...") else pieces


def _origin(sample: _Sample, word: str) -> Html:
    origin = sample.get("url") or str(sample.get("id", ""))[:8]
    return element("small", f"{word}: {origin}, {int(sample['length']):,} characters")

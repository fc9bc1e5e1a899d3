"""The verb ``lightning-lm curate``: raw files through the steps of a recipe into clean text, with a report."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lm.cli.numbers import COUNT
from lightning_lm.cli.tokenizer import STANDARD_LIBRARY
from lightning_lm.errors import DataError, UsageError
from lightning_lm.storage.json_text import parse_json

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_lm.curation import Pipeline, Report

__all__ = ["TAKES_SETTINGS", "add_arguments", "run"]

TAKES_SETTINGS = True
"""The verb also takes ``--steps.STEP.LIMIT VALUE`` and ``--reading.KEY VALUE``."""
_SETTINGS_HELP = """\
any setting of the recipe:
  --steps.GopherQuality.min_words 20        an argument of a step
  --steps+=MyStep                           one more step; also module.function
  --reading.field content                   how files become documents
"""
_TOP_LEVEL = ("input", "output", "steps", "reading", "num_workers", "shard_bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``lightning-lm curate`` takes.

    Args:
        parser: The parser of the verb.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _SETTINGS_HELP
    parser.add_argument("--config", action="append", metavar="NAME", help="recipe or YAML file; later ones win")
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files and folders: WARC, WET, HTML, PDF, text, JSON, CSV, Parquet; "
        f"{STANDARD_LIBRARY} for Python's own sources",
    )
    parser.add_argument("--output", metavar="FOLDER", help="folder of the clean text, the report beside it")
    parser.add_argument("--num-workers", type=COUNT, metavar="N", help="processes (default: one a CPU core)")
    parser.add_argument("--until", metavar="STEP", help="stop after this step: the text of a stage, to compare stages")
    parser.add_argument("--overwrite", action="store_true", help="replace an output of other steps or another input")
    parser.add_argument("--show", choices=("removed", "unreadable"), help="list these documents instead of the table")
    parser.add_argument("--step", metavar="NAME", help="with --show removed: only those that this step removed")
    parser.add_argument("--rule", metavar="NAME", help="with --show removed: only those of this rule")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration, and stop")


def run(arguments: argparse.Namespace) -> int:
    """Curate, and print the table or the documents that were asked for.

    Args:
        arguments: Parsed arguments of `add_arguments`, with the rest of the command line as ``settings``.

    Returns:
        0, or 1 if no document is left.

    Raises:
        UsageError: If the settings cannot be understood.
    """
    import yaml

    from lightning_lm.cli.config.merged import merged_settings
    from lightning_lm.data import Files, StandardLibrary

    words = [f"--config={name}" for name in arguments.config or ()] + list(arguments.settings)
    settings = merged_settings(words, _TOP_LEVEL)
    if arguments.print_config:
        print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")
        return 0
    paths = arguments.input or _paths(settings.get("input"))
    output = arguments.output or settings.get("output")
    if not paths or not output:
        missing = "--input PATH" if not paths else "--output FOLDER"
        raise UsageError(
            f"{missing} is missing: lightning-lm curate --config curation/web --input crawl/ --output clean/"
        )
    report = _pipeline(settings, arguments.until).run(
        StandardLibrary() if list(paths) == [STANDARD_LIBRARY] else Files(path=tuple(paths)),
        Path(output),
        num_workers=arguments.num_workers or settings.get("num_workers"),
        overwrite=arguments.overwrite,
        show_progress=sys.stderr.isatty(),
        **({"shard_bytes": settings["shard_bytes"]} if "shard_bytes" in settings else {}),
    )
    if arguments.show == "removed":
        _show_removed(report, arguments.step, arguments.rule)
    elif arguments.show == "unreadable":
        _show_unreadable(report)
    else:
        _show_table(report)
    return 0 if report.documents_kept else 1


def _pipeline(settings: Mapping[str, Any], until: str | None) -> "Pipeline":
    from lightning_lm.cli.curation_steps import build_pipeline
    from lightning_lm.curation import Pipeline

    pipeline = build_pipeline(settings)
    if until is None:
        return pipeline
    if until not in pipeline.names:
        raise UsageError(f"--until {until}: the steps are {', '.join(pipeline.names) or 'none'}.")
    return Pipeline(pipeline.steps[: pipeline.names.index(until) + 1], pipeline.reading)


def _paths(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _show_table(report: "Report") -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(report))
    for reason, count in report.unreadable.items():
        place = report.examples[reason][0][0]
        console.print(f"Left out {count:,}: {reason} (such as {place})", markup=False, highlight=False)
    kept = f"{report.documents_kept:,} of {report.documents_read:,} documents, {_megabytes(report.bytes_kept)}"
    console.print(f"{kept}, are in {report.folder}. Report: {report.folder / 'report.html'}", markup=False)
    if not report.documents_kept:
        console.print("No document is left: look at the reasons above and at the samples in the report.", markup=False)


def _table(report: "Report") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("step", overflow="fold")
    for name in ("in", "out", "kept", "MB in", "MB out", "changed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("removed by", overflow="fold")
    for step in report.steps:
        reasons = [f"{rule} {count:,}" for rule, count in list(step.reasons.items())[:4]]
        reasons += [f"{len(step.reasons) - 4} more"] if len(step.reasons) > 4 else []
        reasons += [f"({name} {count:,})" for name, count in step.counts.items() if count]
        table.add_row(
            step.name,
            f"{step.documents_in:,}",
            f"{step.documents_out:,}",
            f"{step.documents_out / max(1, step.documents_in):.1%}",
            f"{step.bytes_in / 1e6:,.1f}",
            f"{step.bytes_out / 1e6:,.1f}",
            f"{step.changed:,}" if step.changed else "",
            ", ".join(reasons),
        )
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _show_removed(report: "Report", step: str | None, rule: str | None) -> None:
    """Print a line for each removed document: step, rule, value, limit, origin and the beginning of the text."""
    names = [one.name for one in report.steps]
    if step is not None and step not in names:
        raise UsageError(f"No step is called {step!r}. The steps are: {', '.join(names)}.")
    print("step\trule\tvalue\tlimit\turl or id\ttext")
    for record in _removed(report.folder):
        if step in (None, record["step"]) and rule in (None, record["rule"]):
            values = (record["step"], record["rule"], record.get("value", ""), record.get("limit", ""))
            text = " ".join(record["text"][:400].split())[:80]
            origin = record.get("url") or record["id"]
            print(*(_number(value) for value in values), origin, _printable(text), sep="\t")


def _removed(folder: Path) -> Iterator[Mapping[str, Any]]:

    for path in sorted((folder / ".removed").glob("part-*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield parse_json(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number} is damaged: {error}. Curate the corpus again.") from error


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _show_unreadable(report: "Report") -> None:
    print("reason\tplace\tdetail")
    for reason, examples in report.examples.items():
        for place, detail in examples:
            print(reason, place, " ".join(detail.split()), sep="\t")
        if report.unreadable[reason] > len(examples):
            print(f"{reason}\t... and {report.unreadable[reason] - len(examples):,} more\t")

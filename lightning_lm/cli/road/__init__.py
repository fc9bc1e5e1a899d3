"""The verb ``lightning-lm road``: all stages from text to an aligned model, in one command that can be resumed."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lm.errors import LightningLMError
from lightning_lm.storage import held

if TYPE_CHECKING:
    from lightning_lm.cli.road.drive import Drive, Runner
    from lightning_lm.cli.road.report import RoadReport

__all__ = ["add_arguments", "run"]

_DEFAULT = "road/offline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``lightning-lm road`` takes.

    Args:
        parser: The parser of the verb.
    """
    parser.add_argument(
        "--config", default=_DEFAULT, metavar="NAME", help="road to take: a recipe or YAML file (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("road"),
        metavar="FOLDER",
        help="for all that it writes (default: %(default)s)",
    )
    parser.add_argument("--from", dest="first", metavar="STAGE", help="first stage to run")
    parser.add_argument("--until", dest="last", metavar="STAGE", help="last stage to run")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="run these stages alone")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="options",
        metavar="STAGE.KEY=VALUE",
        help="option of a stage, as pretrain.trainer.max_steps=100; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")


def run(arguments: argparse.Namespace, runner: "Runner | None" = None) -> int:
    """Run the stages that are missing, and write ``report.html`` and ``report.json``.

    Args:
        arguments: Parsed arguments of `add_arguments`.
        runner: Runs the stages; by default in processes of their own.

    Returns:
        0 when every stage that was asked for has finished.

    Raises:
        UsageError: If the road or a name cannot be understood.
        LightningLMError: If a stage fails.
    """
    from lightning_lm.cli.road.drive import Drive, OwnProcesses
    from lightning_lm.cli.road.plan import read_road
    from lightning_lm.cli.road.report import RoadReport

    road = read_road(arguments.config).changed(arguments.options)
    chosen = road.selected(arguments.first, arguments.last, arguments.only)
    if arguments.dry_run:
        for stage in road.stages:
            if stage.name in chosen:
                print(f"{stage.name}:\n  {shlex.join(['lightning-lm', *stage.command(arguments.output)])}")
        return 0
    with held(arguments.output, "use another --output"):
        drive = Drive(road, arguments.output, chosen, command=arguments.command_line, runner=runner or OwnProcesses())
        report = RoadReport(drive)
        try:
            drive.run(report.write)
        except LightningLMError:
            report.write()  # with the curves of the stage that failed
            raise
        _print_table(drive, report)
    return 0


def _print_table(drive: "Drive", report: "RoadReport") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from lightning_lm.cli.road.progress import clock

    content = report.content()
    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column("stage")
    for name in ("time", "CPU-s", "MiB", *(name.removeprefix("val/") for name in content["metrics"])):
        shown.add_column(name, justify="right", overflow="fold")
    for stage in content["stages"]:
        scores = [f"{stage['scores'][name]:.4g}" if name in stage["scores"] else "-" for name in content["metrics"]]
        cost = clock(stage["wall_s"]), f"{stage['cpu_s']:,.0f}", f"{stage['memory_bytes'] / 2**20:,.0f}"
        shown.add_row(stage["name"], *cost, *scores)
    totals = content["totals"]
    cost = clock(totals["wall_s"]), f"{totals['cpu_s']:,.0f}", f"{totals['memory_bytes'] / 2**20:,.0f}"
    shown.add_row("all, with scores", *cost, *("" for _ in content["metrics"]))
    Console().print(shown)
    print(f"Report: {drive.output / 'report.html'} (numbers: {drive.output / 'report.json'})")

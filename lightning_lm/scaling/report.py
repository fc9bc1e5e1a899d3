"""Tables and notes of the verb ``scaling``: printed, and kept for a report file with the figures."""

import datetime
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lm import __version__
from lightning_lm.storage import replacing

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_lm.scaling.fits.fit import Estimate

__all__ = ["Report", "interval", "new_table", "number", "significant"]

_PIPED_WIDTH = 100
"""Columns where nothing says how wide the output is."""


class Report:
    """Prints tables and notes, and writes them to ``report.md`` beside the figures.

    Args:
        title: Heading of the file.
    """

    def __init__(self, title: str) -> None:
        self._title, self._blocks = title, list[str]()

    def say(self, text: str) -> None:
        """Print a note.

        Args:
            text: The note.
        """
        sys.stdout.write(f"{text}\n")
        self._blocks.append(text)

    def table(self, table: Any) -> None:
        """Print a table.

        Args:
            table: Result of `new_table`, with its rows.
        """
        from rich.console import Console

        console = Console()
        known = console.is_terminal or "COLUMNS" in os.environ
        (console if known else Console(width=_PIPED_WIDTH)).print(table)
        text = io.StringIO()
        Console(file=text, width=_PIPED_WIDTH).print(table)
        self._blocks.append("```text\n" + "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n```")

    def write(self, folder: Path, command: str, figures: Sequence[Path]) -> Path:
        """Write what was printed as Markdown, and return the path.

        Args:
            folder: Folder of the figures.
            command: Command line that made them.
            figures: Files to show.
        """
        path = folder / "report.md"
        made = f"`{command}`, lightning-lm {__version__}, {datetime.date.today().isoformat()}"
        shown = [f"![{figure.stem}]({figure.name})" for figure in figures]
        with replacing(path) as file:
            file.write(("\n\n".join([f"# {self._title}", made, *self._blocks, *shown]) + "\n").encode())
        return path


def new_table(title: str, *columns: str) -> "Table":
    """Return an empty table that is narrow enough for 80 columns.

    Args:
        title: Text above it.
        columns: Heads of the columns.
    """
    from rich import box
    from rich.table import Table

    width = min(len(title) + 2, 78)  # a title is broken at the width of its table
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        min_width=width,
        box=box.SIMPLE_HEAD,
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 and column in ("parameter", "method") else "right")
    return table


def interval(estimate: "Estimate") -> str:
    """Return a 95 % interval as text, or nothing if there were no bootstraps.

    Args:
        estimate: A value with its interval.
    """
    if estimate.low != estimate.low:  # not a number
        return ""
    return f"{significant(estimate.low)} to {significant(estimate.high)}"


def number(estimate: "Estimate") -> str:
    """Return the value of an estimate as text.

    Args:
        estimate: A value with its interval.
    """
    return significant(estimate.value)


def significant(value: float) -> str:
    """Return four decimals of numbers of everyday size, and three significant digits of others.

    Args:
        value: A number.
    """
    return f"{value:.4f}" if 0.01 <= abs(value) < 10 else f"{value:.3g}"

"""The progress bar of tokenizer training, on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["TrainingProgress", "training_progress"]


class TrainingProgress:
    """Shows how many characters are counted and how many merges are made. Without a bar it does nothing."""

    def __init__(self, bar: "Progress | None" = None) -> None:
        self._bar = bar
        self._counting: TaskID | None = None
        self._characters = 0
        self._began = time.monotonic()

    def counted(self, characters: int) -> None:
        """Report that more characters of the corpus were counted."""
        if self._bar is None:
            return
        if self._counting is None:
            self._counting = self._bar.add_task("Counting words", total=None, note="")
        self._characters += characters
        megabytes, seconds = self._characters / 1e6, max(1e-9, time.monotonic() - self._began)
        note = f"{megabytes:,.1f} MB, {megabytes / seconds:.1f} MB/s"
        self._bar.update(self._counting, completed=self._characters, note=note)

    def merging(self, total: int) -> Callable[[int], None]:
        """Begin the merges; return the function that takes the number of merges made so far."""
        if self._bar is None:
            return lambda done: None  # noqa: ARG005  (the same call whether or not a bar is shown)
        if self._counting is not None:
            self._bar.update(self._counting, total=self._characters)
        bar, task = self._bar, self._bar.add_task("Learning merges", total=total, note="")
        return lambda done: bar.update(task, completed=done, note=f"{done:,} of {total:,}")


@contextmanager
def training_progress(show: bool | None) -> Iterator[TrainingProgress]:
    """Show a progress bar while the block runs.

    Args:
        show: ``None`` shows it only where stderr is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield TrainingProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield TrainingProgress(bar)

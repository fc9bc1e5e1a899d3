"""Progress of a run: documents, speed, the fraction that is kept, the time left."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["Show"]

Advance = Callable[[int, int, int], None]


class Show(NamedTuple):
    """Display of the stages of a run on standard error."""

    enabled: bool = True

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Advance]:
        """Show a stage; give the function that counts work, documents that came and documents that were kept.

        Args:
            name: Name of the stage.
            total: All of its work, bytes or tasks; ``None`` if that is not known.
        """
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
        )
        console = Console(stderr=True)
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not self.enabled) as progress:
            task = progress.add_task(name, total=total, state="")
            begin, done, came, kept = time.monotonic(), 0, 0, 0

            def advance(work: int, documents_in: int, documents_out: int) -> None:
                nonlocal done, came, kept
                done, came, kept = done + work, came + documents_in, kept + documents_out
                speed = done / 1e6 / max(time.monotonic() - begin, 1e-6)
                state = f"{came:,} documents, {kept / max(came, 1):.0%} kept" if came else ""
                state += f", {speed:.1f} MB/s" if came and done > 1000 else ""
                progress.update(task, completed=done, state=state)

            yield advance

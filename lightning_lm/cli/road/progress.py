"""Progress over all stages: the command of each, one line while it runs, the time so far and the time left."""

import shutil
import sys
import time
from collections.abc import Callable

from lightning_lm.cli.road.plan import Road

__all__ = ["Progress", "clock", "time_left_s"]

_REDRAW_S, _PLAIN_S = 1.0, 60.0
_WIDE = 100
_LIMITS = 0.2, 20.0
"""Bounds of the speed of this machine beside the one on which the expected times were measured."""


class Progress:
    """Prints where a road is: in a terminal on one line that is drawn again, in a log file once a minute.

    Args:
        road: Stages.
        chosen: Names of those that run.
    """

    def __init__(self, road: Road, chosen: set[str]) -> None:
        self._stages = [stage for stage in road.stages if stage.name in chosen]
        self._names = [stage.name for stage in road.stages]
        self._start_s = self._stage_s = self._drawn_s = time.monotonic()
        self._index, self._expected_s = 0, 0.0
        self._measured: list[tuple[float, float]] = []
        self._left: list[float] = [stage.expected_s for stage in self._stages]
        self._is_drawn, self._head = False, ""

    def start(self, index: int, expected_s: float) -> None:
        """Begin with a stage.

        Args:
            index: Its position in the road.
            expected_s: Seconds that it takes.
        """
        self._stage_s = self._drawn_s = time.monotonic()
        self._expected_s = expected_s
        self._left = self._left[1:]
        self._head = f"[{index + 1}/{len(self._names)}] {self._names[index]}"

    def say(self, text: str) -> None:
        """Print what is done now.

        Args:
            text: Command, or what it does.
        """
        self._print(f"{self._head}: {text}")

    def skipped(self, wall_s: float) -> None:
        """Report a stage that had finished before.

        Args:
            wall_s: Seconds that it took.
        """
        self._print(f"{self._head}: finished before, in {clock(wall_s)}")

    def finished(self, line: str) -> None:
        """Report the end of a stage.

        Args:
            line: Last line of its output.
        """
        wall_s = time.monotonic() - self._stage_s
        self._measured.append((wall_s, self._expected_s))
        self._expected_s = 0.0
        self._print(f"{self._head}: finished in {clock(wall_s)} | {line[:_WIDE]}")

    def tick(self, line: Callable[[], str]) -> None:
        """Draw the line if it is time.

        Args:
            line: Returns the last line of the output of the stage.
        """
        now_s = time.monotonic()
        in_terminal = sys.stdout.isatty()
        if now_s - self._drawn_s < (_REDRAW_S if in_terminal else _PLAIN_S):
            return
        self._drawn_s = now_s
        left_s = time_left_s(now_s - self._stage_s, self._expected_s, self._measured, self._left)
        elapsed = f"{clock(now_s - self._stage_s)} | all {clock(now_s - self._start_s)}"
        times = f"{self._head} {elapsed}, about {clock(left_s)} left"
        if not in_terminal:
            self._print(f"{times} | {line()[:_WIDE]}")
            return
        width = shutil.get_terminal_size().columns - 1
        sys.stdout.write(f"\r\x1b[K{f'{times} | {_printable(line())}'[:width]}")
        sys.stdout.flush()
        self._is_drawn = True

    def end(self) -> None:
        """Leave the line that is drawn."""
        if self._is_drawn:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()
        self._is_drawn = False

    def _print(self, text: str) -> None:
        self.end()
        sys.stdout.write(f"{_printable(text)}\n")
        sys.stdout.flush()


def time_left_s(
    elapsed_s: float, expected_s: float, measured: list[tuple[float, float]], further: list[float]
) -> float:
    """Return the expected seconds until the end.

    The speed of this machine is taken from the stages that have finished here, and from the one that runs once it has
    taken longer than that.

    Args:
        elapsed_s: Seconds since the start of the stage that runs.
        expected_s: The time that it was said to take.
        measured: Time and expected time of stages that have finished.
        further: Expected times of the stages to come.

    Example:
        >>> time_left_s(30.0, 60.0, [(20.0, 10.0)], [100.0])  # this machine takes twice as long
        290.0
        >>> time_left_s(240.0, 60.0, [(20.0, 20.0)], [100.0])  # much longer than was expected from the first stage
        325.0
    """
    slowness = _slowness(measured)
    if expected_s and elapsed_s > expected_s * slowness:
        slowness = _slowness([*measured, (elapsed_s, expected_s)])
    return max(expected_s * slowness - elapsed_s, 0.0) + slowness * sum(further)


def _slowness(measured: list[tuple[float, float]]) -> float:
    took_s, said_s = (sum(pair[place] for pair in measured) for place in (0, 1))
    return min(max(took_s / said_s, _LIMITS[0]), _LIMITS[1]) if said_s else 1.0


def clock(seconds: float) -> str:
    """Return minutes and seconds, and hours where there are any.

    Args:
        seconds: Seconds.
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _printable(text: str) -> str:
    return "".join(mark if mark.isprintable() else " " for mark in text)

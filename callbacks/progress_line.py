"""Layout of the progress line: what is needed most survives in a narrow terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.text import Text

__all__ = ["Clock", "Value", "fitted", "progress", "values_of"]

_BARS = (20, 8, 0)
_LOSS = "train/loss"
_SHOWN = (
    ("reward", "train/reward", "cyan"),
    ("val", "val/loss", "green"),
    ("bits/byte", "val/bits_per_byte", "green"),
    ("pass@1", "val/pass@1", "green"),
    ("accuracy", "val/accuracy", "green"),
    ("accuracy", "val/rewards/accuracies", "green"),
)
"""Values that are shown after the loss if they are logged: name, key, colour. The first matter most."""


class Value(NamedTuple):
    """A number of the line."""

    name: str
    value: Any
    colour: str

    def __str__(self) -> str:
        return f"  {self.name} {float(self.value):.4f}"


class Clock(NamedTuple):
    """The end of the line, long and short."""

    rate: str
    elapsed: str
    left: str | None

    def text(self, *, whole: bool) -> Text:
        """Return speed and times; without the time elapsed if the line must be short."""
        if self.left is None:
            times = f"  {self.elapsed} elapsed"
        else:
            times = f"  {self.elapsed} elapsed, {self.left} left" if whole else f"  {self.left} left"
        return Text.assemble(self.rate, (times, "dim"))


def values_of(loss: Any, metrics: Mapping[str, Any], prog_bar: Mapping[str, Any]) -> list[Value]:
    """Return the numbers to show, the most important first.

    Args:
        loss: Training loss, if there is one.
        metrics: Those of the Trainer's callbacks.
        prog_bar: Those that the module logged with ``prog_bar=True``.
    """
    values = [] if loss is None else [Value("loss", loss, "cyan")]
    values += [Value(name, metrics[key], colour) for name, key, colour in _SHOWN if key in metrics]
    known = {_LOSS, *(key for _, key, _ in _SHOWN)}
    return values + [Value(name, value, "yellow") for name, value in prog_bar.items() if name not in known]


def fitted(step: int, total: int | None, values: Sequence[Value], clock: Clock, *, width: int | None) -> Text:
    """Return the line, in a terminal no wider than that.

    First the bar shrinks, then the time elapsed goes, then the bar, then the last of the values; step, speed and time
    left always stay.

    Args:
        step: Optimizer steps so far.
        total: Optimizer steps of the run, if that is known.
        values: Numbers, the most important first.
        clock: The end of the line.
        width: Cells of the terminal; ``None`` in a log file, where there is no bar and no limit.
    """
    if width is None:
        return _joined(progress(step, total, cells=None), values, clock.text(whole=True))
    for whole in (True, False):
        for cells in _BARS[:2] if whole else _BARS[1:]:
            line = _joined(progress(step, total, cells=cells), values, clock.text(whole=whole))
            if line.cell_len <= width:
                return line
    while values and line.cell_len > width:
        values = values[:-1]
        line = _joined(progress(step, total, cells=0), values, clock.text(whole=False))
    return line


def _joined(head: Text, values: Iterable[Value], tail: Text) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append_text(head)
    for value in values:
        line.append(str(value), value.colour)
    return line.append_text(tail)


def progress(step: int, total: int | None, *, cells: int | None) -> Text:
    """Return a bar and the step.

    Args:
        step: Optimizer steps so far.
        total: Optimizer steps of the run, if that is known.
        cells: Width of the bar; ``None`` for the word "step" in its place.
    """
    if not total:
        return Text(f"step {step:,}", "bold")
    fraction = min(1.0, step / total)
    filled = round(fraction * (cells or 0))
    bar = ("━" * filled, "magenta"), ("━" * ((cells or 0) - filled), "bright_black")
    space = " " if cells != 0 else ""
    lead = ("step",) if cells is None else bar
    return Text.assemble(*lead, (f"{space}{step:,}/{total:,}", "bold"), f" {fraction:4.0%}")

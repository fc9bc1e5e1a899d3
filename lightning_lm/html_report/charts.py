"""Line charts and histograms as inline SVG, drawn at the width of a phone: several fit side by side on a desk."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_lm.html_report.markup import Html, element, readable

__all__ = ["Series", "histogram", "line_chart", "ticks"]

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 8, 172
_COLOURS = 6
_MOST_POINTS, _MOST_MARKS = 400, 40

_Points = list[tuple[float, float | None]]
"""Points in order, with ``None`` for a value that cannot be drawn."""


class Series(NamedTuple):
    """One curve.

    Args:
        name: Text of the legend.
        x: Positions.
        y: Values, as many; a value that is not finite leaves a gap.
        faint: Draw it in the background, such as raw values behind their mean; it has no line in the legend.
        colour: Index of the colour; by default that of the curve's position in the chart.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    colour: int | None = None


class _Axis(NamedTuple):
    """A linear or logarithmic map from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def marks(self) -> list[float]:
        found = _log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)
        return [value for value in found if self.low <= value <= self.high]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers from at most ``low`` to at least ``high``: steps of 1, 2 or 5 times a power of ten.

    Args:
        low: Smallest value.
        high: Largest value, above the smallest.
        count: Number of steps to aim at.

    Example:
        >>> ticks(0.3, 4.1)
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= rough * 0.75), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(index * step, digits) + 0.0 for index in range(first, last + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> Html:
    """Return curves over a common axis.

    A curve of more than 400 points is thinned to the smallest and largest value of each stretch, so spikes stay.

    Args:
        title: Heading.
        series: Curves.
        x_label: Unit of the positions.
        y_label: Unit of the values.
        log_x: Logarithmic positions; those that are not positive are left out.
        log_y: Logarithmic values, likewise.

    Raises:
        ValueError: If a curve has more positions than values, or the other way round.
    """
    points = [_finite(one, log_x, log_y) for one in series]
    xs = [x for one in points for x, y in one if y is not None]
    ys = [y for one in points for _, y in one if y is not None]
    if not xs:
        return _figure(title, y_label, [element("text", "no values", x=LEFT + 8, y=TOP + 20)], series=())
    y_axis = _Axis(*_rounded(*_spread(min(ys), max(ys), log_y), log_y), BOTTOM, TOP, log_y)
    x_axis = _Axis(*_spread(min(xs), max(xs), log_x), _left_of(y_axis), RIGHT, log_x)
    drawn = []
    for index, (one, values) in enumerate(zip(series, points, strict=True)):
        drawn += _curve(one, _colour(one, index), values, (x_axis, y_axis))
    return _figure(title, y_label, [*_frame(x_axis, y_axis, x_label), *drawn], series=series)


def histogram(
    title: str,
    counts: Sequence[float],
    edges: Sequence[float],
    *,
    x_label: str = "",
    log_x: bool = False,
    limits: Sequence[float] = (),
) -> Html:
    """Return bars from zero over the bins of a histogram, as ``numpy.histogram`` returns them.

    Args:
        title: Heading.
        counts: Values of the bins, not negative.
        edges: Edges of the bins, ascending, one more than bins.
        x_label: Unit of the edges.
        log_x: Logarithmic edges; all must be positive.
        limits: Positions of vertical lines; those beyond the edges are left out.

    Raises:
        ValueError: If the edges do not fit the counts.
    """
    edges, counts = [float(edge) for edge in edges], [float(count) for count in counts]
    if len(edges) != len(counts) + 1 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"{len(counts)} counts need {len(counts) + 1} ascending edges; got {len(edges)}.")
    if log_x and edges[0] <= 0:
        raise ValueError(f"log_x needs positive edges, got {edges[0]}.")
    if not counts:
        return _figure(title, "", [element("text", "no values", x=LEFT + 8, y=TOP + 20)], series=())
    y_axis = _Axis(0.0, ticks(0.0, max(*counts, 0.0) or 1.0)[-1], BOTTOM, TOP)
    x_axis = _Axis(edges[0], edges[-1], _left_of(y_axis), RIGHT, log_x)
    drawn = []
    for count, (low, high) in zip(counts, itertools.pairwise(edges), strict=True):
        left, right, top = x_axis.place(low), x_axis.place(high), y_axis.place(count)
        note = element("title", f"{readable(low)} to {readable(high)}: {readable(_whole(count))}")
        size = {"width": _pixels(max(right - left - 1, 0.5)), "height": _pixels(BOTTOM - top)}
        drawn.append(element("rect", note, x=_pixels(left), y=_pixels(top), **size, fill="var(--s0)"))
    for limit in limits:
        if edges[0] <= limit <= edges[-1]:
            x = _pixels(x_axis.place(limit))
            note = element("title", f"limit {readable(limit)}")
            drawn.append(element("line", note, x1=x, x2=x, y1=TOP, y2=BOTTOM, stroke="var(--s1)", stroke_width=2))
    return _figure(title, "", [*_frame(x_axis, y_axis, x_label), *drawn], series=())


def _finite(series: Series, log_x: bool, log_y: bool) -> _Points:
    """Return the points of a curve in order, with ``None`` for a value that cannot be drawn, thinned."""
    if len(series.x) != len(series.y):
        raise ValueError(f"The curve {series.name!r} has {len(series.x)} positions and {len(series.y)} values.")
    points: _Points = []
    for x, y in zip(map(float, series.x), map(float, series.y), strict=True):
        if math.isfinite(x) and not (log_x and x <= 0):
            points.append((x, y if math.isfinite(y) and not (log_y and y <= 0) else None))
    return _thinned(points)


def _thinned(points: _Points) -> _Points:
    if len(points) <= _MOST_POINTS:
        return points
    size, kept = math.ceil(2 * len(points) / _MOST_POINTS), _Points()
    for start in range(0, len(points), size):
        piece = points[start : start + size]
        values = [(y, index) for index, (_, y) in enumerate(piece) if y is not None]
        chosen = sorted({min(values)[1], max(values)[1]}) if values else [0]
        kept += [piece[index] for index in chosen]
    return kept


def _spread(low: float, high: float, log: bool) -> tuple[float, float]:
    """Return a range that is not empty."""
    if high > low:
        return low, high
    return (low / 2, high * 2) if log else (low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2)


def _rounded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low, high
    marks = ticks(low, high)
    return marks[0], marks[-1]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 3 else (1, 2, 5)
    step = math.ceil(len(powers) / 7)
    return [factor * 10.0**power for power in powers[::step] for factor in factors]


def _left_of(y_axis: _Axis) -> float:
    """Return where the plot begins: after the numbers of its axis."""
    return max(LEFT, 10 + 6.4 * max(len(_short(value)) for value in y_axis.marks() or [0.0]))


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str) -> list[Html]:
    """Return grid lines with their numbers, and the unit of the positions."""
    drawn = []
    for value in y_axis.marks():
        y = _pixels(y_axis.place(value))
        drawn.append(element("line", x1=_pixels(x_axis.start), x2=RIGHT, y1=y, y2=y, class_="grid"))
        drawn.append(element("text", _short(value), x=_pixels(x_axis.start - 5), y=_pixels(y + 4), text_anchor="end"))
    free = x_axis.start - 20
    for value in x_axis.marks():
        x = _pixels(x_axis.place(value))
        half = 3.4 * len(_short(value)) + 4
        if x - half >= free and x + half <= WIDTH + 8:
            anchor = "end" if x + half > WIDTH else "middle"
            drawn.append(element("text", _short(value), x=x, y=BOTTOM + 14, text_anchor=anchor))
            free = x + half
    drawn.append(element("text", x_label, x=RIGHT, y=BOTTOM + 26, text_anchor="end"))
    return drawn


def _curve(series: Series, colour: str, points: _Points, axes: tuple[_Axis, _Axis]) -> list[Html]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None:
            runs[-1].append((_pixels(axes[0].place(x)), _pixels(axes[1].place(y))))
        elif runs[-1]:
            runs.append([])
    path = " ".join("M" + " L".join(f"{x:g} {y:g}" for x, y in run) for run in runs if run)
    opacity = 0.35 if series.faint else None
    drawn = [element("path", element("title", series.name), d=path, class_="curve", stroke=colour, opacity=opacity)]
    if len(points) <= _MOST_MARKS and not series.faint:
        for x, y in points:
            if y is not None:
                note = element("title", f"{series.name}, {readable(_whole(x))}: {readable(y)}")
                place = {"cx": _pixels(axes[0].place(x)), "cy": _pixels(axes[1].place(y))}
                drawn.append(element("circle", note, **place, r=2.4, fill=colour))
    return drawn


def _figure(title: str, y_label: str, drawn: list[Html], *, series: Sequence[Series]) -> Html:
    named = [(one, _colour(one, index)) for index, one in enumerate(series) if not one.faint]
    label = f"{title}. " + "; ".join(_summary(one) for one, _ in named)
    caption = element("figcaption", title, *([element("small", f" · {y_label}")] if y_label else []))
    drawing = element("svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
    marks = [element("li", element("i", style=f"background:{colour}"), one.name) for one, colour in named]
    return element("figure", caption, drawing, *([element("ul", *marks, class_="legend")] if len(marks) > 1 else []))


def _summary(series: Series) -> str:
    values = [float(y) for y in series.y if math.isfinite(y)]
    return (
        f"{series.name}: from {readable(values[0])} to {readable(values[-1])}"
        if values
        else f"{series.name}: no values"
    )


def _colour(series: Series, index: int) -> str:
    return f"var(--s{(index if series.colour is None else series.colour) % _COLOURS})"


def _short(value: float) -> str:
    """Return a number of an axis, at most six characters of everyday sizes."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}"


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _pixels(value: float) -> float:
    return round(value, 2)

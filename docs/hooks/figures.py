"""Figures of the site: drawn as inline SVG from the tables of `recipes/LOG.md`, which records every measured number."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

__all__ = ["FIGURES", "Chart", "Series", "figure"]

_LOG = Path(__file__).resolve().parents[2] / "recipes" / "LOG.md"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 360, 62, 160, 14, 46
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?")


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        name: Text of the legend.
        x: Positions.
        y: Values, one for each position.
        color: Index of the colour; lines that belong together have the same.
        legend: Show the name.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    legend: bool = True


@dataclass(frozen=True)
class Chart:
    """A chart with one pair of axes.

    Args:
        caption: Text below the chart, with the record that it was drawn from.
        x_label: Name and unit of the horizontal axis.
        y_label: Name and unit of the vertical axis.
        series: Lines.
        log_x: Draw the horizontal axis in logarithms.
        join: Draw lines between the points.
    """

    caption: str
    x_label: str
    y_label: str
    series: Sequence[Series] = field(default_factory=tuple)
    log_x: bool = False
    join: bool = True

    def svg(self) -> str:
        """Return the chart as a block of HTML."""
        at_x = _scale([x for line in self.series for x in line.x], (_LEFT, _WIDTH - _RIGHT), self.log_x)
        at_y = _scale([y for line in self.series for y in line.y], (_HEIGHT - _BOTTOM, _TOP), False)
        parts = [*self._axes(at_x, at_y)]
        for line in self.series:
            points = [(at_x(x), at_y(y)) for x, y in zip(line.x, line.y, strict=True)]
            if self.join:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                parts.append(f'<polyline class="s{line.color}" points="{path}"/>')
            parts += [f'<circle class="s{line.color}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points]
        for row, line in enumerate(line for line in self.series if line.legend and len(self.series) > 1):
            x, y = _WIDTH - _RIGHT + 16, _TOP + 14 + 20 * row
            parts.append(f'<circle class="s{line.color}" cx="{x}" cy="{y - 4}" r="5"/>')
            parts.append(f'<text x="{x + 12}" y="{y}">{escape(line.name)}</text>')
        body = "".join(parts)
        return (
            f'<figure class="chart"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="{escape(self.y_label)} over {escape(self.x_label)}">{body}</svg>'
            f"<figcaption>{self.caption}</figcaption></figure>"
        )

    def _axes(self, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> list[str]:
        xs, ys = ([v for line in self.series for v in line.x], [v for line in self.series for v in line.y])
        bottom, right, parts = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, []
        for tick in _ticks(ys):
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}"/>')
            parts.append(
                f'<text class="tick" x="{_LEFT - 8}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
            )
        for tick in _log_ticks(xs) if self.log_x else _ticks(xs):
            parts.append(
                f'<text class="tick" x="{at_x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{_short(tick)}</text>'
            )
            parts.append(
                f'<line class="axis" x1="{at_x(tick):.1f}" x2="{at_x(tick):.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
            )
        middle = (_TOP + bottom) / 2
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(
            f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(self.x_label)}</text>'
        )
        turned = f'transform="rotate(-90 14 {middle})" text-anchor="middle"'
        parts.append(f'<text x="14" y="{middle}" {turned}>{escape(self.y_label)}</text>')
        return parts


def _scale(values: Sequence[float], to: tuple[float, float], log: bool) -> Callable[[float], float]:
    bend = math.log10 if log else float
    low, high = min(map(bend, values)), max(map(bend, values))
    pad = (high - low) * 0.04 or 1.0
    low, high = low - pad, high + pad
    return lambda value: to[0] + (bend(value) - low) / (high - low) * (to[1] - to[0])


def _ticks(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    raw = (high - low) / 5 or 1.0
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    return [round(step * index, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    distinct = sorted(set(values))
    low, high = math.floor(math.log10(distinct[0])), math.ceil(math.log10(distinct[-1]))
    marks = [factor * 10.0**power for power in range(low, high + 1) for factor in (1, 2, 5)]
    return [mark for mark in marks if distinct[0] * 0.999 <= mark <= distinct[-1] * 1.001]


def _short(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def section(title: str) -> str:
    """Return the section of the log whose heading ends with a title, the newest first.

    Args:
        title: End of the heading, without the date.

    Raises:
        ValueError: If no section has that title.
    """
    for text in re.split(r"^## ", _LOG.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        if text.partition("\n")[0].partition(" · ")[2] == title:
            return text
    raise ValueError(f"{_LOG} has no section '{title}'; correct the figure or the log.")


def row(text: str, start: str) -> list[list[float]]:
    """Return the numbers in each cell of the first table row whose first cell begins with some text.

    Args:
        text: Section of the log.
        start: Beginning of the first cell.

    Raises:
        ValueError: If there is no such row.
    """
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and cells[0].startswith(start):
            return [[float(number.replace(",", "")) for number in _NUMBER.findall(cell)] for cell in cells[1:]]
    raise ValueError(f"{_LOG} has no row '{start}'; correct the figure or the log.")


_SEEDS = "the demonstrations of post-training, three seeds each"
_RECORD = "Drawn from <code>recipes/LOG.md</code>, “{}”."


def _seeds(rows: dict[str, tuple[str, Sequence[float]]]) -> list[Series]:
    """Return three lines for each row, one a seed, in one colour."""
    return [
        Series(name, x, numbers, color, legend=seed == 0)
        for color, (name, (start, x)) in enumerate(rows.items())
        for seed, numbers in enumerate(row(section(_SEEDS), start))
    ]


def _quickstart() -> Chart:
    title = "pretrain/quickstart, on a machine to itself"
    steps, losses = ([cell[0] for cell in row(section(title), start)] for start in ("step", "train/loss"))
    caption = f"Training loss of <code>pretrain/quickstart</code>. {_RECORD.format(title)}"
    return Chart(caption, "optimizer step", "train/loss, nats per token", [Series("train/loss", steps, losses, 0)])


def _rollouts() -> Chart:
    x = (5, 10, 15, 20)
    rows = {name: (f"`{key}`: val/pass@1", x) for name, key in _ROLLOUTS.items()}
    caption = f"Held-out accuracy of reversing five digits, three seeds each. {_RECORD.format(_SEEDS)}"
    return Chart(caption, "rollouts", "val/pass@1", _seeds(rows))


def _reasoning_gym() -> Chart:
    title = "grpo/reasoning_gym, a published model"
    steps = [cell[0] for cell in row(section(title), "step")]
    values = {
        name: [cell[0] for cell in row(section(title), name)]
        for name in ("train/reward", "train/completions/mean_length")
    }
    series = [
        Series("reward", steps, values["train/reward"], 0),
        Series("length, of the limit", steps, [value / 3 for value in values["train/completions/mean_length"]], 1),
    ]
    caption = f"Sampled completions of <code>grpo/reasoning_gym</code>, one seed. {_RECORD.format(title)}"
    return Chart(caption, "optimizer step", "train/reward; length over its limit of 3 tokens", series)


_ROLLOUTS = {"GRPO": "grpo", "PPO": "ppo", "expert iteration": "expert_iteration"}


def _dpo() -> Chart:
    x = (20, 40, 60)
    rows = {"val/loss": ("`dpo`: val/loss", x), "rewards/margins": ("`dpo`: val/rewards/margins", x)}
    caption = f"<code>dpo/reverse</code> on held-out pairs, three seeds. {_RECORD.format(_SEEDS)}"
    return Chart(caption, "optimizer step", "nats; margin", _seeds(rows))


def _reward() -> Chart:
    rows = {"val/accuracy": ("`reward`: val/accuracy", (50, 100, 150, 200))}
    caption = (
        f"<code>reward/reverse</code>: held-out pairs that are ordered right, three seeds. {_RECORD.format(_SEEDS)}"
    )
    return Chart(caption, "optimizer step", "val/accuracy", _seeds(rows))


def _sft() -> Chart:
    rows = {"val/loss": ("`sft`: val/loss", (60, 120))}
    caption = f"<code>sft/reverse</code>, three seeds. {_RECORD.format(_SEEDS)}"
    return Chart(caption, "optimizer step", "val/loss, nats per token", _seeds(rows))


def _isoflop() -> Chart:
    title = "scaling/isoflop_quickstart, larger"
    text = section(title)
    sizes = [cell[-1] for cell in row(text, "FLOPs")]
    series = []
    for color, flops in enumerate(("2.0e10", "4.0e10", "8.0e10", "1.6e11", "3.2e11", "8.0e11", "1.6e12")):
        points = [(size, cell[0]) for size, cell in zip(sizes, row(text, flops), strict=True) if cell]
        series.append(Series(f"{flops} FLOPs", [x for x, _ in points], [y for _, y in points], color))
    caption = f"One line a budget; its lowest point is the best model size for that compute. {_RECORD.format(title)}"
    return Chart(caption, "parameters in matmuls", "val/loss, nats per byte", series, log_x=True)


def _transfer(first: int, name: str) -> Chart:
    title = "scaling/learning_rate_transfer beside scaling/learning_rate_standard"
    text, rates = section(title), ("0.001", "0.002", "0.004", "0.008", "0.016", "0.032", "0.064")
    rows = {rate: row(text, rate)[first : first + 4] for rate in rates}
    series = []
    for index, width in enumerate((16, 32, 64, 128)):
        points = [(float(rate), cells[index][0]) for rate, cells in rows.items() if cells[index]]
        series.append(Series(f"width {width}", [x for x, _ in points], [y for _, y in points], index))
    caption = f"{name}. {_RECORD.format(title)}"
    return Chart(caption, "learning rate", "val/loss, nats per token", series, log_x=True)


def _muon() -> Chart:
    title = "Muon against AdamW, on the quickstart's model and text"
    lines = [line for line in section(title).splitlines() if re.match(r"\| (AdamW|Muon)", line)]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    named = {"AdamW, 200 steps": "AdamW", "Muon, 150 steps": "Muon"}
    series = []
    for color, (name, start) in enumerate(named.items()):
        points = [(float(row[1]), float(row[3])) for row in cells if row[0].startswith(start)]
        series.append(Series(name, [x for x, _ in points], [y for _, y in points], color))
    caption = f"Final validation loss for each learning rate. {_RECORD.format(title)}"
    return Chart(caption, "learning rate", "val/loss, nats per token", series, log_x=True)


FIGURES: dict[str, Callable[[], Chart]] = {
    "quickstart": _quickstart,
    "muon": _muon,
    "sft": _sft,
    "dpo": _dpo,
    "reward": _reward,
    "rollouts": _rollouts,
    "reasoning_gym": _reasoning_gym,
    "isoflop": _isoflop,
    "transfer_standard": lambda: _transfer(0, "Standard parametrisation: the best learning rate falls with the width"),
    "transfer_mup": lambda: _transfer(4, "muP: one learning rate is best at all widths"),
}


def figure(name: str) -> str:
    """Return a figure as a block of HTML.

    Args:
        name: Key of `FIGURES`.

    Raises:
        ValueError: If there is no such figure, or the log lacks its numbers.
    """
    if name not in FIGURES:
        raise ValueError(f"no figure {name!r}; the figures are {', '.join(FIGURES)}")
    return FIGURES[name]().svg()

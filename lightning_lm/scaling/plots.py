"""Pictures of a sweep: what was measured, what was fitted, and how far both agree. Labels stand beside their lines."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_lm.scaling.canvas import INK, label, new_figure, plain
from lightning_lm.scaling.fit import ScalingFit
from lightning_lm.scaling.isoflop import parabolas
from lightning_lm.scaling.laws import ChinchillaLaw, GeneralLaw
from lightning_lm.scaling.points import Curve, FloatArray, Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["collapsed_curves", "contours", "frontier", "isoflop_curves", "pictures", "residuals", "write_pictures"]

_ACCENT, _GREY = "#c2410c", "#9ca3af"
_DPI = 150
_SMOOTHED_POINTS = 50
"""Bins of a loss curve."""
_SHOWN_SHARE = 0.05
"""The beginning of a run is steeper than anything that follows."""


def pictures(points: Points, fit: ScalingFit, curves: Sequence[Curve] = ()) -> dict[str, "Figure"]:
    """Return every picture that the runs allow, by name.

    Args:
        points: The runs.
        fit: Their law.
        curves: Their loss curves.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    drawn = {"frontier": frontier(fit), "residuals": residuals(fit)}
    if len([curve for curve in parabolas(points) if curve.has_minimum]) >= 2:
        drawn["isoflop"] = isoflop_curves(points)
    if isinstance(fit.law, ChinchillaLaw | GeneralLaw):
        drawn["contours"] = contours(fit)
        if len(curves) > 1:
            drawn["curves"] = collapsed_curves(curves, floor=fit.values["E"])
    return drawn


def write_pictures(folder: Path | str, drawn: Mapping[str, "Figure"]) -> list[Path]:
    """Write pictures as PNG, and return the paths.

    Args:
        folder: Made where it does not exist.
        drawn: Result of `pictures`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in drawn]
    for path, figure in zip(paths, drawn.values(), strict=True):
        figure.savefig(path, dpi=_DPI)
    return paths


def isoflop_curves(points: Points) -> "Figure":
    """Draw the loss over the size for each budget, with the parabola and its minimum.

    Args:
        points: The runs.
    """
    figure, axes = _canvas("Each compute budget has a best size", "parameters", "loss, nats per token")
    found = [curve for curve in parabolas(points) if curve.has_minimum]
    colours = _colours(len(found))
    for curve, colour in zip(found, colours, strict=True):
        sizes = points.parameters[curve.rows]
        line = np.geomspace(sizes.min() / 1.1, sizes.max() * 1.1, 100)
        axes.plot(line, curve.at(line), color=colour, linewidth=1.5)
        axes.plot(sizes, points.loss[curve.rows], "o", color=colour, markersize=4)
        end = (line[-1], float(curve.at(line[-1:])[0]))
        label(axes, f"{_short(curve.flops)} FLOPs", end, colour, shift=(5, 0))
    inside = [curve for curve in found if _is_inside(curve.log_size, points.parameters[curve.rows])]
    best = np.exp([curve.log_size for curve in inside])
    axes.plot(best, [curve.loss for curve in inside], "-*", color=_ACCENT, linewidth=1, markersize=11, zorder=5)
    if inside:
        label(axes, "minima", (best[0], inside[0].loss), _ACCENT, shift=(-6, -12), align="right")
    axes.set_xscale("log")
    axes.margins(x=0.22)
    return figure


def frontier(fit: ScalingFit) -> "Figure":
    """Draw the optimal size and data over the budget, with the band in which they may lie.

    Args:
        fit: The law.
    """
    figure, axes = _canvas("How to spend a budget", "training FLOPs", "parameters, or tokens")
    measured = fit.points.flops
    budgets = np.geomspace(measured.min() / 2, measured.max() * 30, 60)
    optima = [fit.optimal(float(budget)) for budget in budgets]
    for name, colour, exponent in (("parameters", INK, fit.exponents[0]), ("tokens", _ACCENT, fit.exponents[1])):
        estimates = [getattr(optimum, name) for optimum in optima]
        axes.fill_between(
            budgets, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.15, lw=0
        )
        values = [e.value for e in estimates]
        axes.plot(budgets, values, color=colour)
        text = f"{name} ~ $C^{{{exponent.value:.2f}}}$\n({exponent.low:.2f} to {exponent.high:.2f})"
        label(axes, text, (budgets[-1], values[-1]), colour, shift=(6, 0))
    axes.axvspan(measured.min(), measured.max(), color=_GREY, alpha=0.15, lw=0)
    axes.set(xscale="log", yscale="log")
    axes.text(
        np.sqrt(measured.min() * measured.max()), 0.02, "measured", ha="center", color=INK,
        transform=axes.get_xaxis_transform(),
    )  # fmt: skip
    axes.margins(x=0.02)
    axes.set_xlim(right=budgets[-1] * 60)
    return figure


def contours(fit: ScalingFit) -> "Figure":
    """Draw the loss that the law gives over size and data, with the runs and the frontier.

    Args:
        fit: Result of `fit_parametric` or `fit_general`.
    """
    figure, axes = _canvas("The fitted law, and the runs it was fitted to", "tokens", "parameters")
    points = fit.points
    sizes = np.geomspace(points.parameters.min() / 2, points.parameters.max() * 4, 80)
    tokens = np.geomspace(points.tokens.min() / 2, points.tokens.max() * 4, 80)
    grid = np.meshgrid(tokens, sizes)
    losses = np.exp(fit.law.log_loss(fit.theta[None], grid[1].ravel(), grid[0].ravel())[0]).reshape(80, 80)
    levels = np.unique(np.round(np.quantile(losses, np.linspace(0.04, 0.92, 10)), 2))
    lines = axes.contour(*grid, losses, levels=levels, colors=_GREY, linewidths=0.9)
    axes.clabel(lines, fmt="%.2f", fontsize=8)
    axes.scatter(points.tokens, points.parameters, c=points.loss, cmap="viridis_r", s=22, zorder=4)
    budgets = np.geomspace(points.flops.min() / 10, points.flops.max() * 100, 40)
    best = np.array([(o.tokens.value, o.parameters.value) for o in map(fit.optimal, budgets.tolist())])
    axes.plot(*best.T, color=_ACCENT, zorder=3)
    axes.set(xscale="log", yscale="log", xlim=tokens[[0, -1]], ylim=sizes[[0, -1]])
    seen = best[(best[:, 0] < tokens[-1] * 0.5) & (best[:, 1] < sizes[-1] * 0.7) & (best[:, 0] > tokens[0])]
    if len(seen):
        label(axes, "compute-optimal", (seen[-1, 0], seen[-1, 1]), _ACCENT, shift=(-4, 8), align="right")
    return figure


def residuals(fit: ScalingFit) -> "Figure":
    """Draw how far each run lies from the law, in percent of its loss, over its budget.

    Args:
        fit: The law.
    """
    figure, axes = _canvas("What the law does not explain", "training FLOPs", "measured over fitted loss, %")
    points = fit.points
    away = 100 * np.expm1(-fit.residuals)
    spread = float(np.sqrt(np.mean(away**2)))
    shown = axes.scatter(points.flops, away, c=np.log10(points.parameters), cmap="viridis", s=26, zorder=3)
    axes.axhline(0, color=INK, linewidth=1)
    axes.axhspan(-spread, spread, color=_GREY, alpha=0.2, lw=0)
    axes.set_xscale("log")
    if points.flops.max() > 10 * points.flops.min():
        axes.xaxis.set_minor_formatter("")  # powers of ten are enough
    limit = 1.25 * max(float(np.abs(away).max()), spread, 1e-6)
    axes.set_ylim(-limit, limit)
    axes.text(
        0.01, spread, f"root mean square {spread:.2g} %", transform=axes.get_yaxis_transform(), va="bottom", color=INK
    )
    bar = figure.colorbar(shown, ax=axes, pad=0.02)
    bar.set_label("parameters, power of ten")
    bar.outline.set_visible(False)
    return figure


def collapsed_curves(curves: Sequence[Curve], *, floor: float = 0.0) -> "Figure":
    """Draw loss curves as they are, and again with both axes divided by their end: one shape, if training was alike.

    Args:
        curves: Curves of the runs.
        floor: Loss that no run can fall below; subtracted before dividing, unless a run came near it.

    Source:
        Qiu et al. 2025, arXiv:2507.02119, section 2.
    """
    if floor > 0.95 * min(float(curve.loss.min()) for curve in curves):
        floor = 0.0  # a fitted floor above what was measured divides by nothing
    figure = new_figure(10, 4.2)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    order = sorted((_smoothed(curve) for curve in curves), key=lambda curve: curve.parameters)
    for curve, colour in zip(order, _colours(len(order)), strict=True):
        share, height = curve.tokens / curve.tokens[-1], (curve.loss - floor) / (curve.loss[-1] - floor)
        left.plot(curve.tokens, curve.loss, color=colour, linewidth=1)
        right.plot(share[share >= _SHOWN_SHARE], height[share >= _SHOWN_SHARE], color=colour, linewidth=1)
    for curve, name, side in ((order[0], "smallest", 1), (order[-1], "largest", -1)):
        colour = _colours(len(order))[0 if side > 0 else -1]
        text = f"{name}, {_short(curve.parameters)}"
        label(left, text, (curve.tokens[-1], curve.loss[-1]), colour, shift=(4, 6 * side))
    left.set(xscale="log", xlabel="tokens", ylabel="loss, nats per token")
    left.margins(x=0.2)
    late = np.concatenate([curve.loss[curve.tokens >= _SHOWN_SHARE * curve.tokens[-1]] for curve in order])
    left.set_ylim(top=float(np.quantile(late, 0.98)))
    plain(left, "As measured: a line is a run, dark ones small")
    right.set(xlabel="share of the run", ylabel="loss above the floor, over its end" if floor else "loss over its end")
    plain(right, "Divided by their ends")
    return figure


def _smoothed(curve: Curve) -> Curve:
    """Return means over bins that grow with the tokens: single batches scatter more than runs differ."""
    place = np.log(curve.tokens / curve.tokens[0])
    bins = np.minimum(place * _SMOOTHED_POINTS / max(float(place[-1]), 1e-9), _SMOOTHED_POINTS - 1).astype(int)
    counts = np.bincount(bins)
    tokens, loss = (np.bincount(bins, column)[counts > 0] / counts[counts > 0] for column in (curve.tokens, curve.loss))
    return Curve(parameters=curve.parameters, tokens=tokens, loss=loss, name=curve.name)


def _canvas(title: str, x: str, y: str) -> tuple["Figure", "Axes"]:
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    plain(axes, title)
    return figure, axes


def _colours(number: int) -> list[Any]:
    from matplotlib import colormaps

    scale: Callable[[float], Any] = colormaps["viridis"]
    return [scale(0.05 + 0.75 * index / max(1, number - 1)) for index in range(number)]


def _is_inside(log_size: float, sizes: FloatArray) -> bool:
    return bool(np.log(sizes.min()) <= log_size <= np.log(sizes.max()))


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size <= number < 1e15:
            return f"{number / size:.3g}{unit}"
    return f"{number:.1e}".replace("e+", "e")

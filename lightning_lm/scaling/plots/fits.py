"""Pictures of a sweep: what was measured, what was fitted, and how far both agree. Labels stand beside their lines."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_lm.scaling.fits.fit import Estimate, Optimum, ScalingFit
from lightning_lm.scaling.fits.holdout import HeldOut
from lightning_lm.scaling.fits.isoflop import parabolas
from lightning_lm.scaling.fits.laws import ChinchillaLaw, GeneralLaw
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN, Curve, FloatArray, Points
from lightning_lm.scaling.plots.canvas import INK, apart, label, new_figure, plain
from lightning_lm.storage import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["collapsed_curves", "contours", "figures", "frontier", "isoflop_curves", "residuals", "write_figures"]

_ACCENT, _GREY = "#c2410c", "#9ca3af"
_DPI = 150
_SMOOTHED_POINTS = 50
"""Bins of a loss curve."""
_SHOWN_SHARE = 0.05
"""The beginning of a run is steeper than anything that follows."""


def figures(
    points: Points,
    fit: ScalingFit,
    curves: Sequence[Curve] = (),
    *,
    held_out: Sequence[HeldOut] = (),
    predicted: Sequence[Optimum] = (),
) -> dict[str, "Figure"]:
    """Return every figure that the runs allow, by name.

    Args:
        points: The runs.
        fit: Their law.
        curves: Their loss curves.
        held_out: Runs that tested the law; they are marked.
        predicted: Optima of larger budgets; they are marked.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    drawn = {"frontier": frontier(fit, predicted), "residuals": residuals(fit, held_out)}
    if len([curve for curve in parabolas(points) if curve.has_minimum]) >= 2:
        drawn["isoflop"] = isoflop_curves(points, held_out)
    if isinstance(fit.law, ChinchillaLaw | GeneralLaw):
        drawn["contours"] = contours(fit, held_out, predicted)
        if len(curves) > 1:
            drawn["curves"] = collapsed_curves(curves, floor=fit.values["E"])
    return drawn


def write_figures(folder: Path | str, drawn: Mapping[str, "Figure"]) -> list[Path]:
    """Write figures as PNG, and return the paths.

    Args:
        folder: Made where it does not exist.
        drawn: Result of `figures`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in drawn]
    for path, figure in zip(paths, drawn.values(), strict=True):
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=_DPI)
    return paths


def isoflop_curves(points: Points, held_out: Sequence[HeldOut] = ()) -> "Figure":
    """Draw the loss over the size for each budget, with the parabola and its minimum.

    Args:
        points: The runs.
        held_out: Runs that tested the law.
    """
    figure, axes = _canvas("Each compute budget has a best size", "parameters", "loss, nats per token")
    found = [curve for curve in parabolas(points) if curve.has_minimum]
    colours, ends = _colours(len(found)), []
    for curve, colour in zip(found, colours, strict=True):
        sizes = points.parameters[curve.rows]
        line = np.geomspace(sizes.min() / 1.1, sizes.max() * 1.1, 100)
        axes.plot(line, curve.at(line), color=colour, linewidth=1.5)
        axes.plot(sizes, points.loss[curve.rows], "o", color=colour, markersize=4)
        ends.append((line[-1], float(curve.at(line[-1:])[0])))
    for curve, colour, end in zip(found, colours, ends, strict=True):
        label(axes, f"{curve.flops:.3g} FLOPs", end, colour, shift=(6, 0))
    inside = [curve for curve in found if _is_inside(curve.log_size, points.parameters[curve.rows])]
    best = np.exp([curve.log_size for curve in inside])
    axes.plot(best, [curve.loss for curve in inside], "-*", color=_ACCENT, linewidth=1, markersize=11, zorder=5)
    if inside:
        label(axes, "minima", (best[0], inside[0].loss), _ACCENT, shift=(-8, -10), align="right")
    _mark_held_out(axes, [(run.parameters, run.loss) for run in held_out])
    axes.set_xscale("log")
    axes.margins(x=0.03)
    return figure


def frontier(fit: ScalingFit, predicted: Sequence[Optimum] = ()) -> "Figure":
    """Draw the optimal size and data over the budget with the band in which they may lie, the runs and predictions.

    Args:
        fit: The law.
        predicted: Optima to mark.
    """
    figure, axes = _canvas("How to spend a budget", "training FLOPs", "parameters, or tokens")
    points = fit.points
    largest = max([points.flops.max() * 10, *(optimum.flops * 2 for optimum in predicted)])
    budgets = np.geomspace(points.flops.min() / 2, largest, 60)
    optima = [fit.optimal(float(budget)) for budget in budgets]
    quantities = {"parameters": (INK, fit.exponents[0]), "tokens": (_ACCENT, fit.exponents[1])}
    ends = [getattr(optima[-1], name).value for name in quantities]
    heights = np.exp(apart(np.log(ends).tolist(), 0.06 * np.log(largest / budgets[0])))
    for (name, (colour, exponent)), height in zip(quantities.items(), heights, strict=True):
        estimates = [getattr(optimum, name) for optimum in optima]
        axes.fill_between(
            budgets, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.15, lw=0
        )
        axes.plot(budgets, [e.value for e in estimates], color=colour)
        axes.plot(points.flops, getattr(points, name), "o", color=colour, markersize=3, alpha=0.35, markeredgewidth=0)
        places = [(optimum.flops, getattr(optimum, name)) for optimum in predicted]
        _mark_predictions(axes, places, colour, above=height == max(heights))
        text = f"{name} ~ $C^{{{exponent.value:.2f}}}$\n({exponent.low:.2f} to {exponent.high:.2f})"
        label(axes, text, (budgets[-1], float(height)), colour, shift=(8, 0))
    axes.axvspan(points.flops.min(), points.flops.max(), color=_GREY, alpha=0.15, lw=0)
    axes.set(xscale="log", yscale="log", xlim=budgets[[0, -1]])
    axes.text(
        np.sqrt(points.flops.min() * points.flops.max()), 0.02, "runs", ha="center", color=INK,
        transform=axes.get_xaxis_transform(),
    )  # fmt: skip
    return figure


def contours(fit: ScalingFit, held_out: Sequence[HeldOut] = (), predicted: Sequence[Optimum] = ()) -> "Figure":
    """Draw the loss that the law gives over size and data, with the runs and the frontier.

    Args:
        fit: Result of `fit_parametric` or `fit_general`.
        held_out: Runs that tested the law.
        predicted: Optima to mark.
    """
    figure, axes = _canvas("The fitted law, and the runs it was fitted to", "tokens", "parameters")
    points = fit.points
    sizes, tokens = (
        np.geomspace(min(measured) / 2, max([max(measured) * 2, *(value * 2 for value in marked)]), 80)
        for measured, marked in (
            (points.parameters, [optimum.parameters.value for optimum in predicted]),
            (points.tokens, [optimum.tokens.value for optimum in predicted]),
        )
    )
    grid = np.meshgrid(tokens, sizes)
    losses = np.exp(fit.law.log_loss(fit.theta[None], grid[1].ravel(), grid[0].ravel())[0]).reshape(80, 80)
    levels = np.unique(np.round(np.quantile(losses, np.linspace(0.04, 0.92, 10)), 2))
    shades = {"cmap": "viridis_r", "vmin": losses.min(), "vmax": losses.max()}
    axes.contour(*grid, losses, levels=levels, linewidths=0.9, **shades)
    for level in levels[(levels > losses[-1, -1]) & (levels < losses[0, -1])]:
        end = float(np.exp(np.interp(-level, -losses[:, -1], np.log(sizes))))
        label(axes, f"{level:.2f}", (tokens[-1], end), _GREY, shift=(4, 0))
    axes.scatter(points.tokens, points.parameters, c=points.loss, s=26, zorder=4, edgecolors="white", **shades)
    _mark_held_out(axes, [(run.tokens, run.parameters) for run in held_out])
    budgets = np.geomspace(tokens[0] * sizes[0], tokens[-1] * sizes[-1] * 100, 80) * FLOPS_PER_PARAMETER_TOKEN
    best = np.array([(o.tokens.value, o.parameters.value) for o in map(fit.optimal, budgets.tolist())])
    axes.plot(*best.T, color=_ACCENT, zorder=3)
    for optimum in predicted:
        axes.plot(optimum.tokens.value, optimum.parameters.value, "*", color=_ACCENT, markersize=12, zorder=5)
        label(
            axes, f"{optimum.flops:.3g} FLOPs", (optimum.tokens.value, optimum.parameters.value), _ACCENT, shift=(9, -6)
        )
    axes.set(xscale="log", yscale="log", xlim=tokens[[0, -1]], ylim=sizes[[0, -1]])
    seen = best[(best[:, 0] > tokens[0]) & (best[:, 1] > sizes[0])]
    seen = seen[(seen[:, 0] < tokens[-1]) & (seen[:, 1] < sizes[-1])]
    if len(seen):
        label(axes, "compute-optimal", (seen[len(seen) // 10, 0], seen[len(seen) // 10, 1]), _ACCENT, shift=(9, -4))
    return figure


def residuals(fit: ScalingFit, held_out: Sequence[HeldOut] = ()) -> "Figure":
    """Draw how far each run lies from the law, in percent of its loss, over its budget.

    Args:
        fit: The law.
        held_out: Runs that tested the law: the errors of the law that was fitted without them.
    """
    from matplotlib.colors import LogNorm

    figure, axes = _canvas("What the law does not explain", "training FLOPs", "measured over fitted loss, %")
    points = fit.points
    away = 100 * np.expm1(-fit.residuals)
    spread = float(np.sqrt(np.mean(away**2)))
    shown = axes.scatter(points.flops, away, c=points.parameters, cmap="viridis", s=26, zorder=3, norm=LogNorm())
    tests = [(run.flops, 100 * (run.loss / run.predicted.value - 1)) for run in held_out]
    _mark_held_out(axes, tests, "held out: fitted without it")
    axes.axhline(0, color=INK, linewidth=1)
    axes.axhspan(-spread, spread, color=_GREY, alpha=0.2, lw=0)
    axes.set_xscale("log")
    if points.flops.max() > 10 * points.flops.min():
        axes.xaxis.set_minor_formatter("")  # powers of ten are enough
    limit = 1.25 * max([float(np.abs(away).max()), spread, 1e-6, *(abs(error) for _, error in tests)])
    axes.set_ylim(-limit, limit)
    axes.text(0.01, 0.97, f"root mean square {spread:.2g} % (grey)", transform=axes.transAxes, va="top", color=INK)
    bar = figure.colorbar(shown, ax=axes, pad=0.02)
    bar.set_label("parameters")
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
        text = f"{name}, {curve.parameters:.3g} parameters"
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


def _mark_held_out(axes: "Axes", places: Sequence[tuple[float, float]], note: str = "held out") -> None:
    """Put a ring around each run that tested the law, and name one of them."""
    for place in places:
        axes.plot(*place, "o", markersize=9, markerfacecolor="none", markeredgecolor=_ACCENT, zorder=5)
    if places:
        label(axes, note, max(places, key=lambda place: place[1]), _ACCENT, shift=(-8, 8), align="right")


def _mark_predictions(axes: "Axes", places: Sequence[tuple[float, Estimate]], colour: str, *, above: bool) -> None:
    """Draw a star with its interval for each predicted budget."""
    for flops, estimate in places:
        axes.plot([flops, flops], [estimate.low, estimate.high], color=colour, linewidth=1.2)
        axes.plot(flops, estimate.value, "*", color=colour, markersize=12, zorder=5)
        shift, align = ((-9, 9), "right") if above else ((9, -9), "left")
        label(axes, f"{estimate.value:.3g}", (flops, estimate.value), colour, shift=shift, align=align)


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

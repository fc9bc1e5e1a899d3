"""The figure of learning-rate transfer: loss over learning rate at each width, and where the minima go."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lightning_lm.scaling.lr_transfer import TransferFit
from lightning_lm.scaling.plots.canvas import apart, label, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["transfer_figure"]

_COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce")


def transfer_figure(fits: Mapping[str, TransferFit]) -> "Figure":
    """Draw a panel of loss curves for each parametrisation, then the best learning rates of all over the width.

    Args:
        fits: By the name that stands over its panel.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = new_figure(4.2 * (len(fits) + 1), 4.2)
    panels = figure.subplots(1, len(fits) + 1, squeeze=False)[0]
    for axes, (name, fit) in zip(panels, fits.items(), strict=False):
        _draw_losses(axes, name, fit)
    low, high = (function([axes.get_ylim() for axes in panels[:-1]], axis=0) for function in (np.min, np.max))
    for axes in panels[:-1]:
        axes.set_ylim(low[0], high[1])
    _draw_optima(panels[-1], fits)
    return figure


def _draw_losses(axes: "Axes", name: str, fit: TransferFit) -> None:
    from matplotlib import colormaps

    losses = np.concatenate([curve.losses for curve in fit.curves])
    heights = apart([float(curve.losses[0]) for curve in fit.curves], 0.05 * float(np.ptp(losses)))
    for index, curve in enumerate(fit.curves):
        colour = colormaps["viridis"](0.05 + 0.75 * index / max(1, len(fit.curves) - 1))
        axes.plot(curve.rates, curve.losses, "o", color=colour, markersize=3)
        line = np.union1d(np.geomspace(curve.rates[0], curve.rates[-1], 200), curve.rates)
        axes.plot(line, curve.loss_at(line), color=colour, linewidth=1.5)
        axes.plot(curve.best, curve.loss_at(curve.best), "*", color=colour, markersize=12, zorder=4)
        width = f"width {curve.width:g}" if index == 0 else f"{curve.width:g}"
        label(axes, width, (curve.rates[0], heights[index]), colour, shift=(-5, 0), align="right")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats per token")
    left, right = (np.log10(function([curve.rates for curve in fit.curves])) for function in (np.min, np.max))
    axes.set_xlim(10 ** (left - 0.4 * (right - left)), 10 ** (right + 0.06 * (right - left)))
    plain(axes, name)


def _draw_optima(axes: "Axes", fits: Mapping[str, TransferFit]) -> None:
    tried = np.unique(np.concatenate([curve.rates for fit in fits.values() for curve in fit.curves]))
    ends = []
    for index, (name, fit) in enumerate(fits.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        widths = np.array([curve.width for curve in fit.curves])
        best = np.array([curve.best for curve in fit.curves])
        line = np.exp(np.log(best).mean() + fit.drift.value * (np.log(widths) - np.log(widths).mean()))
        axes.plot(widths, line, color=colour, linewidth=1.5)
        for curve in fit.curves:
            face = "white" if curve.at_edge else colour
            axes.plot(curve.width, curve.best, "*", color=colour, markerfacecolor=face, markersize=12, zorder=4)
        ends.append((f"{name}:\nwidth$^{{{fit.drift.value:+.2f}}}$", widths[-1], line[-1], colour))
    heights = np.exp(apart([np.log(end[2]) for end in ends], 0.12 * np.log(1.44 * tried[-1] / tried[0])))
    for (text, width, _, colour), height in zip(ends, heights, strict=True):
        label(axes, text, (width, float(height)), colour, shift=(12, 0), align="left")
    axes.set(xscale="log", yscale="log", xlabel="width", ylabel="best learning rate")
    axes.set_xticks(widths, [f"{width:g}" for width in widths])
    axes.set_yticks(tried, [f"{rate:.2g}" for rate in tried])
    axes.set_ylim(tried[0] / 1.2, tried[-1] * 1.2)
    axes.minorticks_off()
    hollow = any(fit.at_edge for fit in fits.values())
    plain(axes, "Best rates (hollow: edge)" if hollow else "Where the minima go")

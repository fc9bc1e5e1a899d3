"""The figure of the critical batch size: steps and examples that runs of several batch sizes took to one loss."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from lightning_lm.scaling.critical_batch import CriticalBatch
from lightning_lm.scaling.plots.canvas import INK, label, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["critical_batch_figure"]

_ACCENT, _BLUE = "#c2410c", "#1d4ed8"


def critical_batch_figure(batch_sizes: ArrayLike, steps: ArrayLike, fit: CriticalBatch) -> "Figure":
    """Draw steps and examples over the batch size, each over its minimum: both are twice that at the critical size.

    Args:
        batch_sizes: Batch size of each run.
        steps: Number of steps to the loss that all reached.
        fit: Result of `fit_critical_batch` for them.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    sizes, taken = (np.asarray(column, dtype=np.float64) for column in (batch_sizes, steps))
    critical, fewest = fit.batch_size, fit.min_steps.value
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    line = np.geomspace(min(sizes.min(), critical.value / 4), max(sizes.max(), critical.value * 4), 100)
    for name, colour, law, measured, end in (
        ("steps", _BLUE, 1 + critical.value / line, taken / fewest, 0),
        ("examples", _ACCENT, 1 + line / critical.value, taken * sizes / (fewest * critical.value), -1),
    ):
        axes.plot(line, law, color=colour)
        axes.plot(sizes, measured, "o", color=colour, markersize=5)
        side, align = ((6, 6), "left") if end == 0 else ((-6, 6), "right")
        label(axes, name, (float(line[end]), float(law[end])), colour, shift=side, align=align)
    axes.axvspan(critical.low, critical.high, color="#9ca3af", alpha=0.25, lw=0)
    axes.plot(critical.value, 2.0, "*", color=INK, markersize=13, zorder=4)
    text = f"critical: {critical.value:.3g}\n({critical.low:.3g} to {critical.high:.3g})"
    label(axes, text, (critical.value, 2.0), INK, shift=(0, -24), align="center")
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="over the fewest possible")
    axes.set_ylim(bottom=0.8)
    plain(axes, "Smaller batches waste steps, larger ones examples")
    return figure

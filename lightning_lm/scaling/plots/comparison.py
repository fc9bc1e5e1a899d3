"""The figure of a comparison of settings: the loss of every run, and the mean of each setting with its interval."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_lm.scaling.comparison import SettingResult
from lightning_lm.scaling.plots.canvas import INK, label, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["comparison_figure"]

_BLUE = "#1d4ed8"


def comparison_figure(results: Sequence[SettingResult]) -> "Figure":
    """Draw a row for each setting, the first at the top.

    Args:
        results: Result of `lightning_lm.scaling.compare_settings`.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = new_figure(7.2, 1.3 + 0.5 * len(results))
    axes = figure.add_subplot()
    for row, one in enumerate(results):
        axes.plot(list(one.losses.values()), [row] * len(one.losses), "o", color=_BLUE, markersize=5, alpha=0.6)
        if one.mean.low == one.mean.low:
            axes.plot([one.mean.low, one.mean.high], [row, row], color=INK, linewidth=1.5, zorder=3)
        axes.plot(one.mean.value, row, "|", color=INK, markersize=16, markeredgewidth=2, zorder=4)
        label(axes, f"{one.mean.value:.3f}", (one.mean.value, row), INK, shift=(0, 15), align="center")
    axes.set_yticks(range(len(results)), [one.value for one in results])
    axes.set_ylim(len(results) - 0.5, -0.8)
    axes.set(xlabel="loss, nats per token")
    plain(axes, "Loss of each setting: runs, mean, 95 % interval")
    return figure

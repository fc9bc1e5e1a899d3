"""Drawing surface of the figures: a figure without a back end, plain axes, labels beside lines."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_lm.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["INK", "apart", "label", "new_figure", "plain"]

INK = "#1f2937"


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure.

    Args:
        width: Inches.
        height: Inches.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which keeps figures and chooses a back end for the process
    except ModuleNotFoundError as error:
        raise MissingDependencyError("matplotlib", "draw figures", extra="scaling") from error
    return Figure(figsize=(width, height), layout="constrained")


def plain(axes: "Axes", title: str) -> None:
    """Leave out what carries no information, and set a title.

    Args:
        axes: To change.
        title: Message of the figure.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)


def label(
    axes: "Axes", text: str, at: tuple[float, float], colour: Any, *, shift: tuple[float, float], align: str = "left"
) -> None:
    """Write beside a point, above the lines.

    Args:
        axes: To write on.
        text: Text of the label.
        at: The point, in data.
        colour: That of what it names.
        shift: Away from the point, in points.
        align: End of the text that lies there.
    """
    axes.annotate(
        text, at, xytext=shift, textcoords="offset points", color=colour, fontsize=9, ha=align, va="center",
        annotation_clip=False, bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}, zorder=6,
    )  # fmt: skip


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Return heights in the same order, the lower ones moved down until none is nearer than the gap to another.

    Args:
        heights: Heights of labels.
        gap: Smallest distance between two of them, in the same unit.
    """
    moved, above = list(heights), float("inf")
    for index in sorted(range(len(heights)), key=lambda index: -heights[index]):
        moved[index] = above = min(heights[index], above - gap)
    return moved

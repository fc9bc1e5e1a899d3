"""Horizontal bars with their numbers: counts by category, such as the documents that each filter removed."""

from collections.abc import Sequence
from typing import NamedTuple

from lightning_lm.html_report.markup import Html, element

__all__ = ["Bar", "bar_chart"]


class Bar(NamedTuple):
    """One bar.

    Args:
        name: Its category.
        value: Its length; not negative.
        note: Text after the number, such as its percentage.
    """

    name: str
    value: float
    note: str = ""


def bar_chart(title: str, bars: Sequence[Bar]) -> Html:
    """Return bars from zero, the longest as long as there is room.

    Args:
        title: Heading.
        bars: Bars, from top to bottom.

    Raises:
        ValueError: If a value is negative or no number.
    """
    bad = next((bar for bar in bars if not 0 <= bar.value < float("inf")), None)
    if bad is not None:
        raise ValueError(f"The bar {bad.name!r} has the value {bad.value}; bars are from 0 to finite numbers.")
    longest = max((bar.value for bar in bars), default=0) or 1
    rows = []
    for bar in bars:
        drawn = element("div", class_="bar", style=f"width:{100 * bar.value / longest:.4g}%") if bar.value else Html()
        rows.append(
            element(
                "tr",
                element("td", bar.name),
                element("td", drawn, class_="track"),
                element("td", bar.value, f" {bar.note}" if bar.note else Html(), class_="number"),
            )
        )
    return element("figure", element("figcaption", title), element("table", *rows, class_="bars"))

"""HTML elements whose text is escaped: what a model wrote or a web page contained stays text."""

import html
import numbers
import re
from collections.abc import Iterable, Sequence

__all__ = ["Html", "code", "element", "escaped", "figures", "prose", "readable", "section", "table", "tiles"]

_UNPRINTABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]")
"""Controls and surrogates: HTML forbids them, and a surrogate cannot be written as UTF-8."""

Cell = object
"""A child of an element: `Html` as it is, a number in readable form, anything else as escaped text."""


class Html(str):
    """Markup that is already safe; any other string is escaped when it becomes a child of an `element`."""

    __slots__ = ()


def escaped(text: str) -> Html:
    r"""Return a text as HTML; characters that HTML forbids become replacement characters.

    Args:
        text: Any text, trusted or not.

    Example:
        >>> escaped("<b>\x00 & 'so on'\ud800")
        '&lt;b&gt;\ufffd &amp; &#x27;so on&#x27;\ufffd'
    """
    return Html(html.escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)))


def readable(value: Cell) -> str:
    """Return a number with at most four significant digits, a whole number with all of its digits, ``None`` as a dash.

    Args:
        value: A number, ``None`` or text.

    Example:
        >>> readable(1234567), readable(0.123456), readable(None), readable("text")
        ('1,234,567', '0.1235', '-', 'text')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        real = float(value)
        return f"{real:,.0f}" if 1000 <= abs(real) < 1e15 else f"{real:.4g}"
    return str(value)


def element(tag: str, *children: Cell, **attributes: str | float | None) -> Html:
    """Return an element with its children inside.

    Args:
        tag: Name of the element.
        *children: `Html`, which stays as it is; everything else is made `readable` and escaped.
        **attributes: Attributes; ``class_`` is ``class`` and ``stroke_width`` is ``stroke-width``;
            ``None`` leaves one out.

    Example:
        >>> element("p", "1 < 2 ", element("b", "yes"), class_="note")
        '<p class="note">1 &lt; 2 <b>yes</b></p>'
    """
    inside = "".join(child if isinstance(child, Html) else escaped(readable(child)) for child in children)
    words = [tag]
    for name, value in attributes.items():
        if value is not None:
            words.append(f'{name.rstrip("_").replace("_", "-")}="{escaped(str(value))}"')
    return Html(f"<{' '.join(words)}>{inside}</{tag}>")


def section(title: str, *blocks: Cell) -> Html:
    """Return a section of a page.

    Args:
        title: Heading.
        *blocks: Paragraphs, tables and figures.
    """
    return element("section", element("h2", title), *blocks)


def prose(*children: Cell) -> Html:
    """Return a paragraph.

    Args:
        *children: Text and elements.
    """
    return element("p", *children)


def code(text: str) -> Html:
    """Return a command, a log or a sample in a fixed-width font; long lines are wrapped, line breaks are kept.

    Args:
        text: Any text.
    """
    return element("pre", text)


def figures(*charts: Html) -> Html:
    """Return charts beside each other, as many as the page is wide enough for.

    Args:
        *charts: Results of `line_chart`, `histogram` and `bar_chart`.
    """
    return element("div", *charts, class_="figures")


def tiles(facts: Iterable[tuple[str, Cell]]) -> Html:
    """Return a row of large numbers with what they are.

    Args:
        facts: Name and value of each.
    """
    shown = [element("div", element("dt", name), element("dd", value)) for name, value in facts]
    return element("dl", *shown, class_="tiles")


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, caption: str = "") -> Html:
    """Return a table; numbers are aligned to the right, and a table wider than the page scrolls by itself.

    Args:
        columns: Heads of the columns.
        rows: Cells of each row, as many as columns.
        caption: Text above it.

    Raises:
        ValueError: If a row has more or fewer cells than there are columns.
    """
    rows = [list(row) for row in rows]
    bad = next((index for index, row in enumerate(rows) if len(row) != len(columns)), None)
    if bad is not None:
        raise ValueError(f"Row {bad} has {len(rows[bad])} cells; the table has {len(columns)} columns.")
    aligned = [all(_is_number(row[place]) for row in rows) for place in range(len(columns))]
    kinds = ["number" if right else None for right in aligned]
    head = [element("th", name, scope="col", class_=kind) for name, kind in zip(columns, kinds, strict=True)]
    body = [
        element("tr", *(element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in rows
    ]
    parts = [element("caption", caption)] if caption else []
    whole = element("table", *parts, element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", whole, class_="scroll")


def _cell(value: Cell, kind: str | None) -> Html:
    return element("td", value, class_=kind)


def _is_number(cell: Cell) -> bool:
    return cell is None or (isinstance(cell, numbers.Real) and not isinstance(cell, bool))

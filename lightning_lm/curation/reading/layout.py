"""Reading order of a page: from boxes with text to lines, column by column.

A simplification of the recursive X-Y cut (Nagy and Seth 1984): one gutter is looked for in the middle of the page,
lines that cross it divide the page into bands, and in each band the left column is read before the right one.
"""

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Box", "page_text"]

_MIN_COLUMN_LINES = 4
_PARAGRAPH_GAP = 0.7
"""Gap between lines, in heights of a line, that ends a paragraph."""


class Box(NamedTuple):
    """A piece of a line, in points from the lower left corner of the page."""

    left: float
    bottom: float
    right: float
    top: float
    text: str

    @property
    def height(self) -> float:
        """Height in points."""
        return self.top - self.bottom


def page_text(boxes: Sequence[Box], width: float) -> str:
    """Return the text of a page in reading order: a line a line, an empty line where a paragraph ends.

    Args:
        boxes: Pieces of lines, in any order.
        width: Width of the page, points.
    """
    boxes = [box for box in boxes if box.text.strip()]
    gutter = _gutter(boxes, width)
    if gutter is None:
        return _lines(boxes)
    columns: list[list[Box]] = [[], []]
    parts: list[str] = []
    for box in sorted(boxes, key=lambda box: -box.top):
        if box.left < gutter < box.right:
            parts += [_lines(column) for column in columns] + [_lines([box])]
            columns = [[], []]
        else:
            columns[box.left > gutter].append(box)
    parts += [_lines(column) for column in columns]
    return "\n\n".join(filter(None, parts))


def _gutter(boxes: Sequence[Box], width: float) -> float | None:
    """Return the place of the gutter between two columns, None if the page has one column.

    Lines of a single column cross every place in the middle, and tables have short cells on both sides of any gap, so
    both sides must have lines that fill most of their column.
    """
    best: tuple[int, float] | None = None
    for step in range(35, 66):
        place = width * step / 100
        crossing = sum(box.left < place < box.right for box in boxes)
        left = [box for box in boxes if box.right <= place]
        right = [box for box in boxes if box.left >= place]
        sides = ((left, place), (right, width - place))
        is_columns = all(_is_column(side, room, width) for side, room in sides)
        if is_columns and crossing * 5 <= min(len(left), len(right)) and (best is None or crossing < best[0]):
            best = crossing, place
    return None if best is None else best[1]


def _is_column(side: Sequence[Box], room: float, width: float) -> bool:
    full = sum(box.right - box.left > 0.6 * (room - 0.1 * width) for box in side)
    return full >= _MIN_COLUMN_LINES and full * 2 >= len(side)


def _lines(boxes: Sequence[Box]) -> str:
    """Return the lines of one column from top to bottom, the boxes of a line from left to right."""
    rows: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: (-(box.top + box.bottom), box.left)):
        if rows and _is_same_line(rows[-1], box):
            rows[-1].append(box)
        else:
            rows.append([box])
    texts, previous = list[str](), None
    for row in rows:
        bottom, top = min(box.bottom for box in row), max(box.top for box in row)
        if previous is not None and previous - top > _PARAGRAPH_GAP * (top - bottom):
            texts.append("")
        texts.append(_joined(sorted(row, key=lambda box: box.left)))
        previous = bottom
    return "\n".join(texts)


def _is_same_line(row: Sequence[Box], box: Box) -> bool:
    first = row[0]
    overlap = min(first.top, box.top) - max(first.bottom, box.bottom)
    return overlap > 0.5 * min(first.height, box.height)


def _joined(row: Sequence[Box]) -> str:
    """Return the text of a line; boxes that touch, such as a letter in italics, get no space between."""
    text, right = "", None
    for box in row:
        touches = right is None or box.left - right < 0.15 * box.height
        text += box.text if touches or text.endswith(" ") else f" {box.text}"
        right = box.right
    return text.rstrip()

"""Records that a reader could not turn into a document, and the limits on size that keep a reader's memory bounded."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_lm.errors import DataError

__all__ = ["MEDIA_TYPE", "SOURCE", "Limits", "TooLong", "Unreadable", "pieces", "too_long", "within"]

MEDIA_TYPE = "_media_type"
"""Key of the metadata with the media type of a text that has not been extracted yet."""
SOURCE = "_source"
"""Key of the metadata with the name of the input that a document came from, for weights by source."""
_ALWAYS = 1 << 26


class Unreadable(NamedTuple):
    """A record that is counted and left out."""

    place: str
    """File, and the record in it."""
    reason: str
    """Short reason, the same for all records of a kind: these are counted by it."""
    detail: str = ""
    """The case at hand."""


class Limits(NamedTuple):
    """Sizes beyond which a document or file is left out."""

    document_bytes: int
    expansion: float


class TooLong(NamedTuple):
    """A piece of a text that is longer than a document may be."""

    length: int


def within(texts: Iterable[str], path: Path, limits: Limits) -> Iterator[str]:
    """Yield the parts of a file's text as long as they are no more than a file of its size can have in earnest.

    Args:
        texts: Parts of the text.
        path: The file, compressed or not.
        limits: Has the largest ratio of text to file.

    Raises:
        DataError: If there is more: most likely the file was made to fill memory.
    """
    size, total = path.stat().st_size, 0
    for text in texts:
        total += len(text)
        if total > max(_ALWAYS, limits.expansion * size):
            raise DataError(
                f"{path} unpacks to more than {limits.expansion:g} times its {size:,} bytes, as files do that are made "
                f"to exhaust memory. If it is in order: --reading.max_expansion {10 * limits.expansion:g}."
            )
        yield text


def pieces(texts: Iterable[str], separator: str | None, limit: int) -> Iterator[str | TooLong]:
    """Split a text that comes in parts at a separator, without keeping a piece that is too long.

    Args:
        texts: Parts of one text, in order.
        separator: Text between pieces; ``None`` for a single piece.
        limit: Characters of the longest piece.
    """
    parts: list[str] = []
    length, tail = 0, ""
    for text in texts:
        *whole, rest = (tail + text).split(separator) if separator else [text]
        for piece in whole:
            yield _piece(parts, piece, length, limit)
            parts, length = [], 0
        keep = len(rest) - min(len(rest), len(separator or "x") - 1)
        length += keep
        if length <= limit:
            parts.append(rest[:keep])
        else:
            parts = []
        tail = rest[keep:]
    yield _piece(parts, tail, length, limit)


def too_long(place: str, length: int, unit: str, limits: Limits) -> Unreadable:
    """Return the record of a document that is larger than the limit.

    Args:
        place: File and record.
        length: Its size.
        unit: Unit of the size.
        limits: Has the limit.
    """
    detail = f"{length:,} {unit}; reading.max_document_bytes={limits.document_bytes:,} is the limit"
    return Unreadable(place, "larger than a document may be", detail)


def _piece(parts: list[str], last: str, length: int, limit: int) -> str | TooLong:
    length += len(last)
    return "".join([*parts, last]) if length <= limit else TooLong(length)

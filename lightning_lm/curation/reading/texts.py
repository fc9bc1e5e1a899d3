"""Documents of text files and of records: everything that training reads, with the fields beside the text."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_lm.curation.document import Document, as_document
from lightning_lm.curation.reading.outcome import Limits, TooLong, Unreadable, pieces, too_long, within
from lightning_lm.data.decoding import decoded
from lightning_lm.data.files import text_of
from lightning_lm.data.records import BadRecords, Place, read_values
from lightning_lm.errors import DataError
from lightning_lm.storage.json_text import parse_json

__all__ = ["document_of", "read_json_lines", "read_records", "read_separated"]


def read_separated(
    path: Path, url: str, separator: str | None, encoding: str | None, limits: Limits
) -> Iterator[Document | Unreadable]:
    """Yield the documents of a text file.

    Args:
        path: The file.
        url: Its name in the corpus.
        separator: Text between documents; ``None`` keeps the file whole.
        encoding: Encoding of a file that is neither UTF-8 nor marked.
        limits: Limits on sizes.

    Raises:
        DataError: If the file cannot be decoded or unpacked.
    """
    texts = within(decoded(path, encoding), path, limits)
    for number, piece in enumerate(pieces(texts, separator, limits.document_bytes), start=1):
        if isinstance(piece, TooLong):
            yield too_long(f"{path}, document {number}", piece.length, "characters", limits)
        elif piece.strip():
            yield as_document(piece.strip("\r\n"), url)


def read_json_lines(path: Path, field: str, encoding: str | None, limits: Limits) -> Iterator[Document | Unreadable]:
    """Yield the documents of a file with a JSON value a line.

    Args:
        path: The file.
        field: The field of a record with its text.
        encoding: Encoding of a file that is neither UTF-8 nor marked.
        limits: Limits on sizes.

    Raises:
        DataError: If the file cannot be decoded or unpacked.
    """
    texts = within(decoded(path, encoding), path, limits)
    for number, line in enumerate(pieces(texts, "\n", 2 * limits.document_bytes), start=1):
        place = Place(str(path), f"line {number}")
        if isinstance(line, TooLong):
            yield too_long(str(place), line.length, "characters", limits)
        elif line.strip():
            try:
                value = parse_json(line)
            except ValueError as error:
                yield Unreadable(str(place), "not JSON", str(error))
                continue
            yield document_of(value, field, place, limits)


def read_records(path: Path, field: str, encoding: str | None, limits: Limits) -> Iterator[Document | Unreadable]:
    """Yield the documents of a JSON array, CSV, Parquet or Arrow file.

    Args:
        path: The file.
        field: The field of a record with its text.
        encoding: Encoding of a text file that is neither UTF-8 nor marked.
        limits: Limits on sizes.

    Raises:
        DataError: If the file is damaged.
    """
    bad = BadRecords("skip")
    for place, value in read_values(path, bad, encoding=encoding):
        yield document_of(value, field, place, limits)
    for _ in range(bad.count):
        yield Unreadable(str(path), "damaged record")


def document_of(value: Any, field: str, place: Place, limits: Limits) -> Document | Unreadable:
    """Return the document of a record.

    Args:
        value: A text, or a mapping with the text, and perhaps ``url`` and ``metadata``.
        field: The field with the text.
        place: Place of the record.
        limits: Limits on sizes.
    """
    try:
        text = text_of(value, field, place)
    except DataError as error:
        return Unreadable(str(place), "no text in the record", str(error))
    if len(text) > limits.document_bytes:
        return too_long(str(place), len(text), "characters", limits)
    if isinstance(value, str):
        return as_document(text)
    url = value.get("url")
    inner = value.get("metadata")
    is_ours = isinstance(inner, Mapping)
    own = {field, "url", "metadata", "id"} if is_ours else {field, "url"}
    metadata = {str(key): item for key, item in value.items() if key not in own} | (dict(inner) if is_ours else {})
    return as_document(text, url if isinstance(url, str) else None, metadata)

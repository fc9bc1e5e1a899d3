"""Documents out of one file: plain text cut at a separator, or the text field of its records."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_lm.data.decoding import decoded, split
from lightning_lm.data.records import BadRecords, Place, read_values
from lightning_lm.errors import DataError

__all__ = ["read_record_texts", "read_text", "text_of"]


def read_text(path: Path, separator: str | None, encoding: str | None = None) -> Iterator[str]:
    """Yield the documents of a text file; line breaks beside a separator belong to no document.

    Args:
        path: UTF-8, or UTF-16 or UTF-32 with a byte-order mark.
        separator: Text between documents. A file without it is one document, kept to the last byte.
        encoding: Encoding of a file that is none of these.

    Raises:
        DataError: If the file cannot be read or decoded.
    """
    pieces = split(decoded(path, encoding), separator, path)
    first, second = next(pieces, ""), next(pieces, None)
    if second is None:
        yield from filter(None, [first])
        return
    for piece in itertools.chain([first, second], pieces):
        yield from filter(None, [piece.strip("\r\n")])


def read_record_texts(path: Path, field: str, bad: BadRecords, encoding: str | None = None) -> Iterator[str]:
    """Yield the text of each record of a file.

    Args:
        path: JSON lines, a JSON array, CSV, Parquet or Arrow.
        field: The field that has the text.
        bad: Policy for records without text.
        encoding: Encoding of a file that is not UTF-8.

    Raises:
        DataError: If the file is damaged, or a record has no text and is not skipped; names its place.
        MissingDependencyError: If a package is needed to read it and not installed.
    """
    for place, record in read_values(path, bad, encoding=encoding, field=field):
        try:
            text = text_of(record, field, place)
        except DataError as error:
            bad.add(error)
            continue
        if text:
            yield text


def text_of(record: Any, field: str, place: Place) -> str:
    """Return a record's text: the record itself if it is a string, else its field.

    Args:
        record: A string, or a dictionary.
        field: The field that has the text.
        place: The place of the record, for messages.

    Raises:
        DataError: If there is no text, or it has a lone surrogate; names the place and the fields that there are.
    """
    if isinstance(record, str):
        return _without_surrogates(record, str(place))
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected a text or an object with the field {field!r}, got {type(record).__name__}.")
    if field not in record:
        raise _no_field(place, field, record)
    text = record[field]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: the field {field!r} is of type {type(text).__name__}, not text. {_advice(text, field)}"
        )
    return _without_surrogates(text, f"{place}, field {field!r}")


def _advice(value: Any, field: str) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return f"Write its texts one a line: jq -c '.{field}[] | {{{field}: .}}' FILE > records.jsonl"
    return "Repair the record."


def _without_surrogates(text: str, where: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character "
                f"{error.start:,}; it is no character and has no UTF-8 form. Repair the record."
            ) from error
    return text


def _no_field(place: Place, field: str, record: dict[str, Any]) -> DataError:
    present = ", ".join(map(repr, record)) or "none"
    message = f"{place} has no field {field!r}; it has {present}."
    texts = {name: len(text) for name, text in record.items() if isinstance(text, str)}
    if not texts:
        lists = [name for name, value in record.items() if isinstance(value, list)]
        advice = f" Write its records one a line: jq -c '.{lists[0]}[]' FILE > records.jsonl" if lists else ""
        return DataError(f"{message} None of them is text.{advice}")
    name = max(texts, key=lambda name: texts[name])
    if not place.file:
        return DataError(f"{message} Pass field={name!r}.")
    return DataError(
        f"{message} Pass field={name!r}, on the command line: --data.train Files --data.train.path {place.file} "
        f"--data.train.field {name}"
    )

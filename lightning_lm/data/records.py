"""Records out of one file, each with its place: JSON lines, JSON, CSV, Parquet and Arrow, told apart by content.

Everything is read in blocks, so a file may be larger than memory as long as each of its records is not.
"""

import csv
import importlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_lm.data.decoding import decoded, split
from lightning_lm.data.formats import RECORDS, foreign, format_of
from lightning_lm.data.unpacking import import_optional
from lightning_lm.errors import DataError

__all__ = ["BadRecords", "NotJSONError", "OnBadRecord", "Place", "Placed", "read_records", "read_values"]

OnBadRecord = Literal["raise", "skip"]
_ROWS = 1024
_STRUCTURE = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"|["\[\]{},]')
"""Whole texts, and the characters that structure JSON. A text has no line breaks: one that does has lost its end."""


class NotJSONError(DataError):
    """A value that is no JSON, in a file that should have nothing else."""


class Place(NamedTuple):
    """The place of a record in its source, before anything was split or dropped."""

    file: str
    where: str
    """Such as ``line 32`` or ``row group 0, row 17``; both count as editors and Parquet tools do."""

    def __str__(self) -> str:
        return f"{self.file}, {self.where}" if self.file else self.where


class Placed(NamedTuple):
    """A record and its place."""

    place: Place
    record: Any


class BadRecords:
    """Policy for records that cannot be used: an error, or dropped and counted.

    Args:
        action: ``"raise"`` stops at the first one; ``"skip"`` continues.
        remedy: Last line of an error: how such records are skipped.

    Attributes:
        count: Number of dropped records.
    """

    def __init__(self, action: OnBadRecord = "raise", remedy: str = "") -> None:
        self.action, self._remedy = action, remedy
        self.count = 0
        self._first: list[str] = []

    def add(self, error: DataError) -> None:
        """Raise the error of a record, or count the record.

        Args:
            error: Names the place of the record.

        Raises:
            DataError: The error itself with the remedy, unless bad records are skipped.
        """
        if self.action == "raise":
            error.args = (f"{error}\n{self._remedy}".rstrip(),)
            raise error
        self.count += 1
        if len(self._first) < 3:
            self._first.append(str(error))

    def report(self, source: object) -> None:
        """Warn of the dropped records, if there are any.

        Args:
            source: Names where they come from.
        """
        if self.count:
            listed = "".join(f"\n  {message}" for message in self._first) + ("\n  ..." if self.count > 3 else "")
            warnings.warn(f"Dropped {self.count:,} bad record(s) of {source}:{listed}", stacklevel=2)


def read_records(
    path: Path, bad: BadRecords | None = None, *, encoding: str | None = None
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield every record of a file with its place and all its fields.

    Args:
        path: A file of JSON lines, a JSON array, CSV, Parquet or Arrow, told apart by content.
        bad: Policy for a record that is no object or cannot be read; ``None`` raises.
        encoding: Encoding of a file that is not UTF-8.

    Raises:
        DataError: If the file has no records, or is damaged.
        MissingDependencyError: If a package is needed to read it and not installed.
    """
    bad = BadRecords() if bad is None else bad
    for place, record in read_values(path, bad, encoding=encoding):
        if isinstance(record, dict):
            yield place, record
        else:
            bad.add(DataError(f"{place}: expected a JSON object, got {type(record).__name__}."))


def read_values(
    path: Path, bad: BadRecords, *, encoding: str | None = None, field: str | None = None
) -> Iterator[Placed]:
    """Yield every record of a file, or bare text of a JSON file, with its place.

    Args:
        path: As for `read_records`.
        bad: Policy for a record that cannot be read.
        encoding: Encoding of a file that is not UTF-8.
        field: The only field that is needed, to read no other column of a Parquet or Arrow file.

    Raises:
        DataError: If the file has no records, or is damaged.
        MissingDependencyError: If a package is needed to read it and not installed.
    """
    found = format_of(path)
    if found.remedy is not None:
        raise foreign(path, found)
    if found.name not in RECORDS:
        raise DataError(
            f"{path} is plain text without records; JSON lines, a JSON array, CSV, Parquet or Arrow is needed."
        )
    if found.name in _TEXT_READERS:
        texts = decoded(path, encoding)
        yield from _TEXT_READERS[found.name](path, texts, bad)
    else:
        yield from _columnar(path, found.name, bad, field)


def _json_lines(path: Path, texts: Iterable[str], bad: BadRecords) -> Iterator[Placed]:
    for number, line in enumerate(split(texts, "\n", path), start=1):
        if not line.strip():
            continue
        place = Place(str(path), f"line {number}")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad.add(_not_json(place, error, "one object a line is needed"))
            continue
        yield Placed(place, value)


def _json_values(path: Path, texts: Iterable[str], bad: BadRecords) -> Iterator[Placed]:
    """Read the elements of a JSON array, or JSON values that follow each other, holding one at a time.

    A broken element of an array is skipped if its end can be told, by its brackets and quotes.
    """
    buffer, decoder, number = _Buffer(texts), json.JSONDecoder(), 0
    is_array = buffer.peek() == "["
    if is_array:
        buffer.advance(1)
    while (following := buffer.peek()) and not (is_array and following == "]"):
        number += 1
        place = Place(str(path), f"record {number}")
        try:
            value = buffer.value(decoder, place)
        except NotJSONError as error:
            length = buffer.length_of_broken_value() if is_array and bad.action == "skip" else None
            if length is None:
                raise
            buffer.advance(length)
            bad.add(error)
        else:
            yield Placed(place, value)
        if is_array and (following := buffer.peek()) != "]":
            if following != ",":
                raise DataError(f"{place} is followed by {following!r}, where a comma or the array's end is needed.")
            buffer.advance(1)
    if is_array and not following:
        raise DataError(f"{path} ends before its array does: it was cut short. Fetch or write it again.")


class _Buffer:
    """The part of a text that comes in blocks which has not been read yet."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self._text, self._place = "", 0

    def peek(self) -> str:
        """Return the next character that is no white space, or an empty text at the end."""
        while True:
            while self._place < len(self._text):
                if not self._text[self._place].isspace():
                    return self._text[self._place]
                self._place += 1
            if not self._grow(1):
                return ""

    def advance(self, count: int) -> None:
        """Skip characters."""
        self._place += count

    def value(self, decoder: json.JSONDecoder, place: Place) -> Any:
        """Read a JSON value, fetching text until it is whole."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._place)
                length = end - self._place
                if end < len(self._text) or not self._grow(1):  # a number may continue in the next block
                    self._place += length
                    return value
            except RecursionError as error:
                raise _not_json(place, error, "an object is needed") from error
            except ValueError as error:
                if not self._grow(len(self._text) - self._place):
                    raise _not_json(place, error, "an object is needed") from error

    def length_of_broken_value(self) -> int | None:
        """Return the characters up to the comma or bracket that ends a broken element of an array; None if none does.

        The rest of the file has been read to find that the value is broken.
        """
        depth = 0
        for token in _STRUCTURE.finditer(self._text, self._place):
            mark = token[0]
            if mark == '"':
                return None  # a text that does not end
            if depth == 0 and mark in ",]":
                return token.start() - self._place
            depth += (mark in "[{") - (mark in "]}")
            if depth < 0:
                return None
        return None

    def _grow(self, size: int) -> bool:
        parts = [self._text[self._place :]]
        added = 0
        for text in self._texts:
            parts.append(text)
            added += len(text)
            if added >= size:
                break
        self._text, self._place = "".join(parts), 0
        return added > 0


def _csv(path: Path, texts: Iterable[str], bad: BadRecords) -> Iterator[Placed]:
    csv.field_size_limit(sys.maxsize)
    lines = (line + "\n" for line in split(texts, "\n", path))
    header = next(lines, "")
    delimiter = max("\t,;", key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        place = Place(str(path), f"line {rows.line_num + 2}")
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{place} is not CSV ({error}).") from error
        if len(row) == len(names):
            yield Placed(place, dict(zip(names, row, strict=True)))
        elif any(row):
            bad.add(DataError(f"{place} has {len(row)} cells, and the header {len(names)}."))


_TEXT_READERS: dict[str, Callable[[Path, Iterable[str], BadRecords], Iterator[Placed]]] = {
    "json-lines": _json_lines,
    "json": _json_values,
    "csv": _csv,
}


def _columnar(path: Path, name: str, bad: BadRecords, field: str | None) -> Iterator[Placed]:
    arrow = import_optional("pyarrow", f"read {name} files")
    batches = _parquet_batches if name == "parquet" else _arrow_batches
    try:
        for where, first, batch in batches(path, field):
            yield from _rows_of(path, where, first, batch, bad)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as {name.capitalize()}: {error}") from error


def _parquet_batches(path: Path, field: str | None) -> Iterator[tuple[str, int, Any]]:
    parquet = importlib.import_module("pyarrow.parquet")
    with parquet.ParquetFile(path) as file:
        columns = [field] if field in file.schema_arrow.names else None
        for group in range(file.num_row_groups):
            first = 0
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=columns):
                yield f"row group {group}", first, batch
                first += batch.num_rows


def _arrow_batches(path: Path, field: str | None) -> Iterator[tuple[str, int, Any]]:
    """Yield the batches of Arrow's file format and of its stream format, which `datasets` writes."""
    arrow, ipc = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.ipc")
    with arrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = iter(ipc.open_stream(file))
        for number, batch in enumerate(batches):
            batch = batch.select([field]) if field in batch.schema.names else batch
            for first in range(0, batch.num_rows, _ROWS):
                yield f"record batch {number}", first, batch.slice(first, _ROWS)


def _rows_of(path: Path, where: str, first: int, batch: Any, bad: BadRecords) -> Iterator[Placed]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = None
    for number in range(batch.num_rows):
        place = Place(str(path), f"{where}, row {first + number}")
        try:
            record = batch.slice(number, 1).to_pylist()[0] if rows is None else rows[number]
        except UnicodeDecodeError as error:
            bad.add(DataError(f"{place} has bytes that are not UTF-8 text ({error.reason})."))
            continue
        yield Placed(place, record)


def _not_json(place: Place, error: Exception, needed: str) -> NotJSONError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    if isinstance(error, RecursionError):
        reason = "nested too deep"
    return NotJSONError(f"{place} is not JSON ({reason.split(';')[0]}); {needed}.")

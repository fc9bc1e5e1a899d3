"""Reading documents out of one file: plain text with a separator, JSON lines, Parquet; gzip and Zstandard unpacked.

Everything is read in blocks, so a file may be larger than memory as long as each of its documents is not.
"""

import codecs
import gzip
import importlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_lm.errors import DataError, MissingDependencyError

__all__ = ["is_binary", "kind_of", "read_json_lines", "read_parquet", "read_records", "read_text", "text_of"]

_BLOCK = 1 << 20
_LONGEST = 1 << 31
"""Characters of a document beyond which a missing separator is more likely than a document."""


def kind_of(path: Path) -> str:
    """Return ``"json"``, ``"parquet"`` or ``"text"``, judged by the file's name."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".ndjson")):
        return "json"
    return "parquet" if name.endswith(".parquet") else "text"


def is_binary(path: Path) -> bool:
    """Tell whether a file is no text: a zero byte in its first block, and no mark of UTF-16 or UTF-32."""
    start = next(_blocks(path), b"")[: 1 << 13]
    return b"\0" in start and _encoding_of(start) == "utf-8-sig"


def read_text(path: Path, separator: str | None) -> Iterator[str]:
    """Yield the documents of a text file; line breaks beside a separator belong to no document.

    Args:
        path: UTF-8, or UTF-16 or UTF-32 with a byte-order mark.
        separator: Text between documents. A file without it is one document, kept to the last byte.

    Raises:
        DataError: If the file cannot be read or decoded.
    """
    pieces = _split(_decoded(path), separator, path)
    first, second = next(pieces, ""), next(pieces, None)
    if second is None:
        yield from filter(None, [first])
        return
    for piece in itertools.chain([first, second], pieces):
        yield from filter(None, [piece.strip("\r\n")])


def read_json_lines(path: Path, field: str) -> Iterator[str]:
    """Yield the text of each line of a file of JSON objects.

    Raises:
        DataError: If a line is no JSON object or lacks the field; says which line.
    """
    for where, record in _json_objects(path):
        yield text_of(record, field, where=where)


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """Yield the text column of a Parquet file.

    Raises:
        DataError: If the file is damaged or lacks the column.
        MissingDependencyError: If ``pyarrow`` is not installed.
    """
    for record in _parquet_rows(path, [field]):
        yield text_of(record, field, where=str(path))


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield every record of a file of JSON lines or a Parquet file, with all its fields.

    Raises:
        DataError: If the file is neither, is damaged, or a line of it is no JSON object.
        MissingDependencyError: If a package is needed to read it and not installed.
    """
    kind = kind_of(path)
    if kind == "text":
        raise DataError(f"{path} holds no records; a .jsonl or .parquet file is needed (.gz and .zst are unpacked).")
    if kind == "parquet":
        yield from _parquet_rows(path, None)
        return
    for where, record in _json_objects(path):
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}.")
        yield record


def _json_objects(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_split(_decoded(path), "\n", path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON ({error.msg}); one object a line is needed.") from error


def _parquet_rows(path: Path, columns: list[str] | None) -> Iterator[dict[str, Any]]:
    arrow = _import("pyarrow", "read Parquet files")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            missing = [name for name in columns or [] if name not in file.schema_arrow.names]
            if missing:
                raise _no_field(str(path), missing[0], file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except (arrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def text_of(record: Any, field: str, where: str) -> str:
    """Return a record's text: the record itself if it is a string, else its field.

    Raises:
        DataError: If there is no text; names the fields that there are.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a text or an object with the field {field!r}, got {type(record).__name__}.")
    if field not in record:
        raise _no_field(where, field, list(record))
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: the field {field!r} holds {type(text).__name__}, not text.")
    return text


def _no_field(where: str, field: str, present: list[str]) -> DataError:
    return DataError(f"{where} has no field {field!r}; it has {', '.join(map(repr, present))}. Pass field=...")


def _blocks(path: Path) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    damage: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    try:
        with path.open("rb") as file:
            reader: Any = file
            if suffix == ".gz":
                reader = gzip.GzipFile(fileobj=file)
            elif suffix == ".zst":
                zstandard = _import("zstandard", f"read {path.name}")
                damage = (*damage, zstandard.ZstdError)
                reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            while block := reader.read(_BLOCK):
                yield block
    except damage as error:
        raise DataError(f"{path} is damaged or not what its name says ({error}); fetch or pack it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _encoding_of(start: bytes) -> str:
    for mark, encoding in (
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if start.startswith(mark):
            return encoding
    return "utf-8-sig"


def _decoded(path: Path) -> Iterator[str]:
    decoder = None
    position = 0
    for block in _blocks(path):
        if decoder is None:
            encoding = _encoding_of(block)
            decoder = codecs.getincrementaldecoder(encoding)()
        yield _decode(decoder, block, path, position)
        position += len(block)
    if decoder is not None:
        yield _decode(decoder, b"", path, position, final=True)


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, position: int, final: bool = False) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (near byte {position + error.start}: {error.reason}). "
            "Convert it, for example with: iconv -f latin1 -t utf-8"
        ) from error


def _split(texts: Iterable[str], separator: str | None, path: Path) -> Iterator[str]:
    """Split a text that comes in blocks, the separator possibly cut by a block's end."""
    parts: list[str] = []
    length, tail = 0, ""
    for text in texts:
        *pieces, rest = (tail + text).split(separator) if separator else [text]
        for piece in pieces:
            yield "".join([*parts, piece])
            parts, length = [], 0
        keep = len(rest) - min(len(rest), len(separator or "x") - 1)
        parts.append(rest[:keep])
        tail = rest[keep:]
        length += keep
        if length > _LONGEST:
            raise DataError(
                f"{path} goes on for more than {_LONGEST} characters without the separator {separator!r}, too long "
                "for one document. Say what stands between its documents: Files(path=..., separator=...)."
            )
    yield "".join([*parts, tail])


def _import(package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(package, purpose, extra="files") from error

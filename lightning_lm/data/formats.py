"""The format of a file, judged by its content: names say little, and a wrong guess trains on markup."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from lightning_lm.data.decoding import bom_encoding, wide_encoding
from lightning_lm.data.unpacking import packing_of, read_start
from lightning_lm.errors import DataError
from lightning_lm.storage.json_text import parse_json

__all__ = ["BINARY", "RECORDS", "TEXTUAL", "Format", "foreign", "format_of"]

RECORDS = ("json-lines", "json", "csv", "parquet", "arrow")
"""Names of the formats whose files have records."""


TEXTUAL = ("text", "json-lines", "json", "csv")
"""Names of the formats whose files can be read as plain text."""


BINARY = "binary data of an unknown format"
"""Name of the format of files that look like nothing."""


class Format(NamedTuple):
    """The format of a file."""

    name: str
    """``text``, ``json-lines``, ``json``, ``csv``, ``parquet``, ``arrow``; else a description of the file."""
    remedy: str | None = None
    """Remedy for a file that no reader takes; ``None`` if one does."""


_EXTRACT = "extract its text first"
_UNPACK = "unpack it first and name the folder"
_TOKENS = "if these are token ids, name their source: --data.train TokenFiles --data.train.path PATH"
_SIGNATURES: tuple[tuple[int, bytes, str, str | None], ...] = (
    (0, b"PAR1", "parquet", None),
    (0, b"ARROW1", "arrow", None),
    (0, b"\xff\xff\xff\xff", "arrow", None),
    (0, b"\x93NUMPY", "a NumPy array", _TOKENS),
    (0, b"MMIDIDX\0\0", "the index of a Megatron data set", _TOKENS),
    (0, b"PARE", "an encrypted Parquet file", "decrypt it first"),
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer", "fetch the file itself: git lfs pull"),
    (0, b"%PDF", "a PDF document", _EXTRACT),
    (0, b"{\\rtf", "an RTF document", _EXTRACT),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of Microsoft Office", _EXTRACT),
    (0, b"%!PS", "a PostScript document", _EXTRACT),
    (0, b"WARC/", "a web archive (WARC)", _EXTRACT),
    (0, b"SQLite format 3\0", "an SQLite database", "export its texts as JSON lines"),
    (0, b"ORC", "an ORC file", "convert it to Parquet"),
    (0, b"Obj\x01", "an Avro file", "convert it to Parquet"),
    (0, b"FEA1", "a Feather file of version 1", "convert it to Parquet"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", "export its texts as JSON lines"),
    (0, b"GGUF", "model weights (GGUF)", "name the folder of the text instead"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file", "unpack it first"),
    (0, b"\xff\x06\0\0sNaPpY", "a Snappy file", "unpack it first"),
    (0, b"\x1f\x9d", "a file of compress (.Z)", "unpack it first"),
    (0, b"]\0\0", "an LZMA file", "unpack it first"),
    (0, b"\x89PNG\r\n", "a PNG image", "leave it out"),
    (0, b"\xff\xd8\xff", "a JPEG image", "leave it out"),
    (0, b"GIF8", "a GIF image", "leave it out"),
    (0, b"II*\0", "a TIFF image", "leave it out"),
    (0, b"MM\0*", "a TIFF image", "leave it out"),
    (8, b"WEBP", "a WebP image", "leave it out"),
    (8, b"WAVE", "a sound", "leave it out"),
    (4, b"ftyp", "a video or sound", "leave it out"),
    (0, b"ID3", "a sound", "leave it out"),
    (0, b"OggS", "a sound", "leave it out"),
    (0, b"fLaC", "a sound", "leave it out"),
    (0, b"\x1aE\xdf\xa3", "a video", "leave it out"),
    (0, b"\x7fELF", "a program", "leave it out"),
)
_PROMISED = {
    ".parquet": Format("parquet"),
    ".arrow": Format("arrow"),
    ".npy": Format("a damaged array", "write it again"),
}
"""Formats by name, for files that should begin with their signature and do not: their readers report it."""
_CONTROLS = bytes({*range(1, 32)} - {*b"\t\n\v\f\r\x1b"})
_ZIPPED = (
    (b"word/", "a Word document (.docx)"),
    (b"ppt/", "a PowerPoint document (.pptx)"),
    (b"xl/", "an Excel workbook (.xlsx)"),
    (b"application/epub+zip", "an EPUB book"),
    (b"application/vnd.oasis", "an OpenDocument file"),
)
_OBJECT_START = re.compile(r'\{\s*(?:"(?:[^"\\\n]|\\.)*"\s*:|\})')
_ARRAY_START = re.compile(r'\[\s*\{\s*(?:"(?:[^"\\\n]|\\.)*"\s*:|\})')


def format_of(path: Path) -> Format:
    """Return the format of a file.

    Only CSV, which has no mark of its own, is told by its name; a name that promises JSON is held to it.

    Args:
        path: A file, compressed or not.

    Raises:
        DataError: If it cannot be read.
    """
    start, is_whole = read_start(path)
    suffix, is_packed = _suffix(path)
    found = _signed(start) or _PROMISED.get(suffix) or _binary(start)
    if found is not None:
        return Format(f"a compressed {found.name} file", "unpack it first") if is_packed and not found.remedy else found
    if suffix in (".csv", ".tsv"):
        return Format("csv")
    text = start.decode(bom_encoding(start) or "utf-8-sig", errors="ignore").lstrip()
    return Format(_json_layout(text, is_whole, suffix) or "text")


def foreign(path: Path, found: Format) -> DataError:
    """Return the error for a file that no reader takes.

    Args:
        path: The file.
        found: Its format.
    """
    return DataError(f"{path} is {found.name}, which is not read as text or records; {found.remedy}.")


def _suffix(path: Path) -> tuple[str, bool]:
    """Return the ending of a name without that of its compression, and whether the file is compressed."""
    with path.open("rb") as file:
        is_packed = packing_of(file.read(16)) is not None
    return (Path(path.stem) if is_packed else path).suffix.lower(), is_packed


def _signed(start: bytes) -> Format | None:
    if packing_of(start) is not None:
        return Format("a file that was compressed twice", "unpack it once")
    for offset, signature, name, remedy in _SIGNATURES:
        if start.startswith(signature, offset):
            return Format(name, remedy)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        document = next((name for mark, name in _ZIPPED if mark in start), None)
        return Format("a zip archive", _UNPACK) if document is None else Format(document, _EXTRACT)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return Format("a pickle, which could run code when opened", "write its texts as JSON lines")
    if start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 30 and b"\0" in start[:8]:
        return Format("model weights (safetensors)", "name the folder of the text instead")
    return None


def _binary(start: bytes) -> Format | None:
    if bom_encoding(start) is not None or wide_encoding(start) is not None:
        return None
    controls = len(start) - len(start.translate(None, _CONTROLS))
    if b"\0" not in start and 20 * controls <= len(start):
        return None
    return Format(BINARY, f"leave it out, or {_TOKENS}")


def _json_layout(text: str, is_whole: bool, suffix: str) -> str | None:
    """Return ``json-lines`` for a value a line, ``json`` for an array or values over several lines, else None."""
    line, newline, _ = text.partition("\n")
    is_object = isinstance(_parsed(line), dict) if newline or is_whole else bool(_OBJECT_START.match(text))
    if _ARRAY_START.match(text):
        return "json"
    if suffix in (".jsonl", ".ndjson"):
        return "json-lines"
    if suffix == ".json":
        return "json-lines" if is_object or not text else "json"
    if is_object and _mostly_objects(text):
        return "json-lines"
    if not _OBJECT_START.match(text):
        return None
    return "json" if not is_whole or _begins_with_object(text) else None


def _mostly_objects(text: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip()]
    return 2 * sum(line.lstrip().startswith("{") for line in lines) >= len(lines)


def _begins_with_object(text: str) -> bool:
    """Tell whether a text is a JSON object, with nothing after it but another."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text[end:].lstrip()[:1] in ("", "{")


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None

"""Documents of web archives (WARC and WET), by fastwarc.

Crawls are never whole: a record that is cut short, has a wrong length, or a body that does not unpack is counted, and
reading resumes at the next record. Bodies are unpacked here and not by the library, which ends the archive at the
first one that is damaged and returns the beginning of one that was cut short as if it were all.
"""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from lightning_lm.curation.document import Document, as_document
from lightning_lm.curation.reading.bodies import BodyError, unpacked_body
from lightning_lm.curation.reading.encoding import decode
from lightning_lm.curation.reading.members import find_record, is_whole_record
from lightning_lm.curation.reading.outcome import MEDIA_TYPE, Limits, Unreadable, too_long
from lightning_lm.curation.reading.pdf import read_pdf
from lightning_lm.data.unpacking import import_optional
from lightning_lm.errors import DataError

__all__ = ["read_archive"]

_HTML = ("text/html", "application/xhtml+xml", "application/xhtml")
_UNKNOWN = ("", "application/octet-stream", "application/unknown", "unknown/unknown", "binary/octet-stream")
_Found: TypeAlias = Document | Unreadable | None


def read_archive(
    path: Path, limits: Limits, first: int = 0, last: int | None = None
) -> Iterator[Document | Unreadable]:
    """Yield the pages of an archive, each as the text of its markup.

    Args:
        path: WARC or WET file; of a compressed archive each record is a gzip member.
        limits: Limits on sizes.
        first: Byte from which on records begin that are read.
        last: Byte before which they begin; ``None`` reads to the end.

    Raises:
        DataError: If the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = find_record(file, first)
            if start is None and first == 0:
                yield Unreadable(str(path), "archive without records")
            while start is not None and (last is None or start < last):
                start = yield from _read_from(file, path, limits, start, last)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_from(
    file: BinaryIO, path: Path, limits: Limits, start: int, last: int | None
) -> Generator[Document | Unreadable, None, int | None]:
    """Yield records up to the end or a damaged one; return where reading resumes, ``None`` at the end.

    A record is given when the one after it has been found: until then a wrong length has not shown.
    """
    warc = import_optional("fastwarc.warc", "read web archives", extra="curation")
    file.seek(start)
    records = iter(warc.ArchiveIterator(file, parse_http=True, auto_decode="none", fsspec_args=False))
    held: _Found = None
    position, is_first = start, True
    while True:
        try:
            record = next(records, None)
        except (OSError, ValueError) as error:
            if is_first or not is_whole_record(file, position):
                held = Unreadable(f"{path}, byte {position:,}", "damaged archive record", str(error))
            elif held is not None:
                yield held
                held = Unreadable(f"{path}, after byte {position:,}", "damaged archive record", str(error))
            if held is not None:
                yield held
            return find_record(file, position + 1)
        if held is not None:
            yield held
        if record is None or (last is not None and record.stream_pos >= last):
            return None
        position, is_first = record.stream_pos, False
        try:
            held = _document(record, f"{path}, byte {position:,}", limits)
        except (OSError, ValueError) as error:
            yield Unreadable(f"{path}, byte {position:,}", "damaged archive record", str(error))
            return find_record(file, position + 1)


def _document(record: Any, place: str, limits: Limits) -> _Found:
    """Return the document of a record; ``None`` for records that are no pages, such as requests."""
    kind, headers = str(record.record_type), record.headers
    url = (headers.get("WARC-Target-URI") or "").strip("<> ")
    if kind not in ("response", "resource", "conversion") or url.startswith(("dns:", "filedesc:")):
        return None if kind in _NO_PAGES else Unreadable(place, "damaged archive record", f"its type is {kind}")
    length = record.content_length
    body = record.reader.read(limits.document_bytes + 1)
    if len(body) > limits.document_bytes:
        return too_long(place, length, "bytes", limits)
    if len(body) < length or not url:
        return Unreadable(place, "truncated archive record", f"{len(body):,} of {length:,} bytes are there")
    if record.is_http_parsed and (status := record.http_headers.status_code) != 200:
        return Unreadable(place, "page with another HTTP status than 200", f"{status} of {url}")
    if record.is_http_parsed:
        try:
            body = unpacked_body(body, record.http_headers, limits.document_bytes)
        except BodyError as error:
            return Unreadable(place, "body that does not unpack", str(error))
    media_type, _, parameters = (_content_type(record, kind) or "").partition(";")
    metadata = {"date": date} if (date := headers.get("WARC-Date")) else {}
    return _of_body(body, media_type.strip().lower(), _charset(parameters), url, metadata, place, limits)


_NO_PAGES = ("warcinfo", "request", "metadata", "revisit", "continuation")


def _content_type(record: Any, kind: str) -> str | None:
    if record.is_http_parsed:
        found: str | None = record.http_headers.get("Content-Type")
        return found
    return "text/plain; charset=utf-8" if kind == "conversion" else record.headers.get("Content-Type")


def _charset(parameters: str) -> str | None:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return value.strip("\"' ") or None
    return None


def _of_body(
    body: bytes, media_type: str, charset: str | None, url: str, metadata: dict[str, Any], place: str, limits: Limits
) -> Document | Unreadable:
    if not body:
        return Unreadable(place, "empty page")
    if media_type in _UNKNOWN:
        media_type = _sniffed(body)
    if media_type == "application/pdf":
        return read_pdf(body, url, place, limits, metadata)
    if media_type in _HTML:
        return as_document(decode(body, charset, is_html=True), url, metadata | {MEDIA_TYPE: "text/html"})
    if media_type.startswith("text/plain"):
        return as_document(decode(body, charset), url, metadata)
    return Unreadable(place, "no text page", media_type)


def _sniffed(body: bytes) -> str:
    start = body[:1024].lstrip()
    if start.startswith(b"%PDF"):
        return "application/pdf"
    return "text/html" if start[:1] == b"<" else "unknown content"

"""Bodies of HTTP responses: chunks put together and compression undone, up to a limit."""

import io
import zlib
from typing import Any

from lightning_lm.data.unpacking import import_optional

__all__ = ["BodyError", "unpacked_body"]

_GZIP = b"\x1f\x8b"
_READERS = {"br": "BrotliReader", "zstd": "ZstdReader"}


class BodyError(ValueError):
    """A body that is not what its headers declare."""


def unpacked_body(body: bytes, headers: Any, limit: int) -> bytes:
    """Return the content of a response.

    Crawlers that store bodies unpacked often leave the headers as they were, so a body without the marks of its
    declared form is taken as it is.

    Args:
        body: The body as it was transferred.
        headers: Headers of the response, with ``get``.
        limit: Bytes of the largest content.

    Raises:
        BodyError: If it is damaged, larger than the limit, or compressed in an unknown way.
    """
    if "chunked" in (headers.get("Transfer-Encoding") or "").lower():
        body = _without_chunks(body)
    encodings = (headers.get("Content-Encoding") or "").lower().replace(" ", "").split(",")
    for encoding in reversed(encodings):
        if encoding not in ("", "identity", "none", "utf-8"):
            body = _decompressed(body, encoding, limit)
    return body


def _without_chunks(body: bytes) -> bytes:
    line, newline, _ = body[:64].partition(b"\r\n")
    if not newline or _size(line) is None:
        return body
    parts, place = list[bytes](), 0
    while True:
        end = body.find(b"\r\n", place)
        size = _size(body[place:end]) if 0 <= end - place < 64 else None
        if size is None:
            raise BodyError(f"the chunk at byte {place:,} has no size")
        if size == 0:
            return b"".join(parts)
        chunk = body[end + 2 : end + 2 + size]
        if len(chunk) < size:
            raise BodyError(f"the chunk at byte {place:,} has {len(chunk):,} of {size:,} bytes")
        parts.append(chunk)
        place = end + 4 + size


def _size(line: bytes) -> int | None:
    try:
        return int(line.partition(b";")[0].strip(), 16)
    except ValueError:
        return None


def _decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    if encoding in ("gzip", "x-gzip"):
        return _inflated(body, 31, limit) if body.startswith(_GZIP) else body
    if encoding == "deflate":
        return _inflated(body, 15 if body[:1] == b"\x78" else -15, limit)
    if encoding not in _READERS:
        raise BodyError(f"the encoding {encoding} is unknown")
    reader = getattr(import_optional("fastwarc.stream_io", "read web archives", extra="curation"), _READERS[encoding])
    try:
        content: bytes = reader(io.BytesIO(body)).read(limit + 1)
    except OSError as error:
        raise BodyError(f"not {encoding}: {error}") from error
    return _limited(content, limit)


def _inflated(body: bytes, window: int, limit: int) -> bytes:
    unpacker = zlib.decompressobj(window)
    try:
        content = _limited(unpacker.decompress(body, limit + 1), limit)
    except zlib.error as error:
        raise BodyError(str(error)) from error
    if not unpacker.eof:
        raise BodyError("it ends in the middle")
    return content


def _limited(content: bytes, limit: int) -> bytes:
    if len(content) > limit:
        raise BodyError(f"it unpacks to more than {limit:,} bytes, which reading.max_document_bytes allows")
    return content

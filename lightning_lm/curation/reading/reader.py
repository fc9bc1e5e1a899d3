"""One file after another, each read by its content."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from lightning_lm.curation.document import Document, as_document
from lightning_lm.curation.reading.archives import read_archive
from lightning_lm.curation.reading.encoding import decode
from lightning_lm.curation.reading.outcome import MEDIA_TYPE, SOURCE, Limits, Unreadable, too_long
from lightning_lm.curation.reading.pdf import read_pdf
from lightning_lm.curation.reading.texts import read_json_lines, read_records, read_separated
from lightning_lm.data.decoding import UndecodableError, check_encoding
from lightning_lm.data.formats import format_of
from lightning_lm.data.unpacking import read_blocks, read_start
from lightning_lm.errors import DataError
from lightning_lm.parts import Limit, Part

__all__ = ["Reading"]

_HTML_NAMES = (".html", ".htm", ".xhtml", ".xht")
_HTML_START = re.compile(rb"\s*(<!--.*?-->\s*|<\?xml[^>]*>\s*)*<(!doctype\s+html|html|head|body)\b", re.I | re.S)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(Part, limits={"max_document_bytes": Limit.COUNT, "max_expansion": Limit.POSITIVE}):
    """Settings of the readers that make documents of files.

    WARC and WET archives give their pages, HTML and PDF files one document each, text files and records the documents
    that training reads from them.

    Args:
        field: The field of a record with its text.
        separator: Text between documents of a text file; ``None`` keeps each file whole.
        encoding: Encoding of text and record files that are neither UTF-8 nor marked; ``None`` detects it.
        pattern: Glob of the files of a folder to read.
        max_document_bytes: Size of the largest document, bytes; a larger one is counted and left out.
        max_expansion: Largest ratio of a file's text to its compressed size, beyond 64 MB; more is refused.

    Raises:
        ConfigurationError: If there is no such encoding, or a number is out of range.
    """

    field: str = "text"
    separator: str | None = "<|endoftext|>"
    encoding: str | None = None
    pattern: str = "**/*"
    max_document_bytes: int = 32_000_000
    max_expansion: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoding(self.encoding)

    def documents(
        self, path: Path, name: str, source: str, span: tuple[int, int] | None = None
    ) -> Iterator[Document | Unreadable]:
        """Yield the documents of a file; a file that cannot be read is one record that is counted.

        Args:
            path: The file.
            name: Its name in the corpus: the url of documents that have none of their own.
            source: Name of the input, for weights by source.
            span: First byte, and byte after the last, at which the records begin that are read, of an archive.
        """
        try:
            for found in self._of_file(path, name, span):
                yield _with_source(found, source) if isinstance(found, Document) else found
        except DataError as error:
            yield Unreadable(str(path), "file that cannot be read", str(error))

    def _of_file(self, path: Path, name: str, span: tuple[int, int] | None) -> Iterator[Document | Unreadable]:
        limits = Limits(self.max_document_bytes, self.max_expansion)
        if not path.is_file():
            yield Unreadable(str(path), "file that cannot be read", "a link to nothing, or no regular file")
            return
        start = read_start(path)[0]
        if not start:
            yield Unreadable(str(path), "empty file")
        elif start.startswith(b"WARC/"):
            yield from read_archive(path, limits, *(span or (0, None)))
        elif start[:1024].lstrip().startswith(b"%PDF"):
            yield read_pdf(path, name, str(path), limits)
        elif _is_html(path, start):
            yield self._html(path, name, limits)
        else:
            yield from self._texts(path, name, limits)

    def _html(self, path: Path, name: str, limits: Limits) -> Document | Unreadable:
        data = _bytes(path, limits)
        if len(data) > limits.document_bytes:
            return too_long(str(path), path.stat().st_size, "bytes", limits)
        return as_document(decode(data, self.encoding, is_html=True), name, {MEDIA_TYPE: "text/html"})

    def _texts(self, path: Path, name: str, limits: Limits) -> Iterator[Document | Unreadable]:
        found = format_of(path)
        if found.remedy is not None:
            yield Unreadable(str(path), found.name, found.remedy)
        elif found.name == "json-lines":
            yield from read_json_lines(path, self.field, self.encoding, limits)
        elif found.name != "text":
            yield from read_records(path, self.field, self.encoding, limits)
        else:
            try:
                yield from read_separated(path, name, self.separator, self.encoding, limits)
            except UndecodableError:
                data = _bytes(path, limits)
                if len(data) > limits.document_bytes:
                    raise
                texts = decode(data).split(self.separator) if self.separator else [decode(data)]
                yield from (as_document(text.strip("\r\n"), name) for text in texts if text.strip())


def _is_html(path: Path, start: bytes) -> bool:
    if _HTML_START.match(start[:4096]):
        return True
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst").removesuffix(".xz").removesuffix(".bz2")
    return name.endswith(_HTML_NAMES) and (b"<" in start or not start.strip())


def _bytes(path: Path, limits: Limits) -> bytes:
    """Return a file's bytes, or the first ones of a file that is too large."""
    data = bytearray()
    for block in read_blocks(path):
        data += block
        if len(data) > limits.document_bytes:
            break
    return bytes(data)


def _with_source(document: Document, source: str) -> Document:
    return dataclasses.replace(document, metadata={**document.metadata, SOURCE: source})

"""Units of work of the first stage: groups of small files, parts of large archives, chunks of a stream."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_lm.curation.document import Document, as_document
from lightning_lm.curation.execution.statistics import utf8_length
from lightning_lm.curation.reading.members import is_divisible
from lightning_lm.curation.reading.outcome import SOURCE, Limits, Unreadable
from lightning_lm.curation.reading.reader import Reading
from lightning_lm.curation.reading.texts import document_of
from lightning_lm.data.paths import find_files, roots_of
from lightning_lm.data.records import Place
from lightning_lm.data.sources import Files, Source, Texts, as_source

__all__ = ["FilePart", "FileUnit", "TextUnit", "Unit", "units_of"]

_UNIT_BYTES = 1 << 24
_SPAN_BYTES = 1 << 26
_CHUNK_BYTES = 1 << 22
_ARCHIVES = (".warc", ".warc.gz", ".wet", ".wet.gz", ".warc.wet", ".warc.wet.gz")


@dataclasses.dataclass(frozen=True)
class FilePart:
    """A file, or the records of an archive that begin in a range of its bytes."""

    path: Path
    name: str
    source: str
    size: int
    mtime_ns: int
    span: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class FileUnit:
    """Files that are read together."""

    parts: tuple[FilePart, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(part.size if part.span is None else part.span[1] - part.span[0] for part in self.parts)

    @property
    def key(self) -> str:
        """Digest of names, sizes and times of change."""
        states = [(part.name, part.source, part.size, part.mtime_ns, part.span) for part in self.parts]
        return hashlib.sha256(repr(states).encode("utf-8", "surrogatepass")).hexdigest()

    def documents(self, reading: Reading) -> Iterator[Document | Unreadable]:
        """Yield the documents of the files.

        Args:
            reading: Settings of the readers.
        """
        for part in self.parts:
            yield from reading.documents(part.path, part.name, part.source, part.span)


@dataclasses.dataclass(frozen=True)
class TextUnit:
    """Documents that came as a stream."""

    found: tuple[Document | Unreadable, ...]
    num_bytes: int

    @property
    def key(self) -> str:
        """Digest of the documents."""
        digest = hashlib.sha256()
        for item in self.found:
            digest.update(f"{item.id}\n".encode() if isinstance(item, Document) else f"{item.place}\n".encode())
        return digest.hexdigest()

    def documents(self, reading: Reading) -> Iterator[Document | Unreadable]:  # noqa: ARG002
        """Yield the documents.

        Args:
            reading: Settings of the readers.
        """
        yield from self.found


Unit = FileUnit | TextUnit


def units_of(source: Any, reading: Reading, excluded: Sequence[Path] = ()) -> Iterable[Unit]:
    """Return the units of a source: a list of those of files, in an order that does not depend on how they were named.

    Args:
        source: Path or paths, a `Source`, or an iterable of documents, texts or records.
        reading: Settings of the readers.
        excluded: Folders that are not read, such as the output.
    """
    if not isinstance(source, Source) and _is_stream(source):
        return _chunks(_items(source, reading))
    found = as_source(source)
    if isinstance(found, Files):
        return list(_grouped(_parts(found.path, reading, excluded)))
    return _chunks(_items(found.texts if isinstance(found, Texts) else found.documents(), reading))


def _is_stream(source: Any) -> bool:
    if isinstance(source, str | os.PathLike):
        return False
    return not (isinstance(source, list | tuple) and isinstance(as_source(source), Files))


def _parts(paths: str | tuple[str, ...], reading: Reading, excluded: Sequence[Path]) -> list[FilePart]:
    parts: dict[str, FilePart] = {}
    hidden = [os.path.realpath(folder) for folder in excluded]
    for root in roots_of(paths):
        for path in find_files(root, reading.pattern):
            real = os.path.realpath(path)
            if any(os.path.commonpath([real, folder]) == folder for folder in hidden):
                continue
            status = path.stat() if path.exists() else path.lstat()
            name = path.relative_to(root).as_posix() if path != root else path.name
            part = FilePart(path, name, root.name or "input", status.st_size, status.st_mtime_ns)
            if real not in parts or part.name < parts[real].name:
                parts[real] = part
    return sorted(parts.values(), key=lambda part: (part.source, part.name, str(part.path)))


def _grouped(parts: Iterable[FilePart]) -> Iterator[FileUnit]:
    group: list[FilePart] = []
    size = 0
    for part in parts:
        if part.size > _SPAN_BYTES and _is_divisible(part.path):
            for first in range(0, part.size, _SPAN_BYTES):
                span = (first, min(first + _SPAN_BYTES, part.size))
                yield FileUnit((dataclasses.replace(part, span=span),))
            continue
        group.append(part)
        size += part.size
        if size >= _UNIT_BYTES or len(group) >= 1000:
            yield FileUnit(tuple(group))
            group, size = [], 0
    if group:
        yield FileUnit(tuple(group))


def _is_divisible(path: Path) -> bool:
    if not path.name.lower().endswith(_ARCHIVES):
        return False
    with path.open("rb") as file:
        return is_divisible(file)


def _items(source: Any, reading: Reading) -> Iterator[Document | Unreadable]:
    limits = Limits(reading.max_document_bytes, reading.max_expansion)
    for number, item in enumerate(source() if callable(source) else source):
        if isinstance(item, Document):
            yield item
        else:
            found = document_of(item, reading.field, Place("", f"item {number}"), limits)
            if isinstance(found, Document):
                found = as_document(found.text, found.url, {**found.metadata, SOURCE: "items"})
            yield found


def _chunks(items: Iterable[Document | Unreadable]) -> Iterator[TextUnit]:
    group: list[Document | Unreadable] = []
    size = 0
    for item in items:
        group.append(item)
        size += utf8_length(item.text) if isinstance(item, Document) else 0
        if size >= _CHUNK_BYTES or len(group) >= 10_000:
            yield TextUnit(tuple(group), size)
            group, size = [], 0
    if group:
        yield TextUnit(tuple(group), size)

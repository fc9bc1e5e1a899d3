"""Where documents come from. A source is a value that YAML can name; it is read again whenever its text is needed."""

import dataclasses
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_lm.data.files import read_record_texts, read_text, text_of
from lightning_lm.data.formats import foreign, format_of
from lightning_lm.data.records import BadRecords, Place
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.parts import Part

__all__ = ["Files", "Mixture", "Source", "Texts", "as_source"]

_READ_WHOLE = 1 << 26
"""Files of a folder up to this size are decoded before their first document is given; one larger fails when read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(Part):
    """Base of the places documents come from."""

    def documents(self) -> Iterator[str]:
        """Yield every document, in an order that does not change. Starts anew at each call."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str | None:
        """Hex digest that changes when the documents change, or None if that cannot be told without reading."""
        raise NotImplementedError

    @property
    def num_bytes(self) -> int | None:
        """Size of the text in bytes, for progress bars, or None if it is not known."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files(Source):
    """A file, or all files of a folder, each read by its name.

    ``.jsonl`` and ``.parquet`` files give the text of each record; any other file is text, split at the separator or
    one document. ``.gz`` and ``.zst`` are unpacked. In a folder, hidden files are left out, and files up to 64 MiB
    that are binary or not UTF-8 are skipped and counted in a warning; any other file that cannot be read is an error.

    Args:
        path: The file or folder.
        separator: Text between documents of a text file; None keeps each file whole.
        field: The field of a record that holds its text.
        pattern: Which files of a folder are taken, as a glob.
    """

    path: str
    separator: str | None = "<|endoftext|>"
    field: str = "text"
    pattern: str = "**/*"

    def documents(self) -> Iterator[str]:
        """Yield the documents of each file, the files in the order of their names.

        Raises:
            DataError: If there is nothing to read, or a file is damaged.
        """
        root, paths = Path(self.path), self._paths()
        skipped: list[str] = []
        for path in paths:
            found = format_of(path)
            if path == root or (found.name != "text" and found.remedy is None) or path.stat().st_size > _READ_WHOLE:
                yield from self._read(path)
            elif (texts := self._read_if_text(path)) is not None:
                yield from texts
            else:
                skipped.append(str(path.relative_to(root)))
        _report(root, skipped)

    @property
    def fingerprint(self) -> str | None:
        """Digest of names, sizes and times of change of the files, and of how they are read."""
        return digest_of_files(self._paths(), Path(self.path), self.separator, self.field)

    @property
    def num_bytes(self) -> int | None:
        """Bytes on disk, if no file is packed or columnar."""
        paths = self._paths()
        if any(format_of(path).name != "text" for path in paths):
            return None
        return sum(path.stat().st_size for path in paths)

    def _read(self, path: Path) -> Iterator[str]:
        found = format_of(path)
        if found.remedy is not None:
            raise foreign(path, found)
        if found.name == "text":
            return read_text(path, self.separator)
        return read_record_texts(path, self.field, BadRecords())

    def _read_if_text(self, path: Path) -> list[str] | None:
        try:
            if format_of(path).remedy is not None:
                return None
            return list(read_text(path, self.separator))
        except DataError:
            return None

    def _paths(self) -> list[Path]:
        root = Path(self.path)
        if not root.exists():
            raise DataError(f"There is no file or folder {self.path!r} (looked from {Path.cwd()}).")
        if not root.is_dir():
            return [root]
        inside = (path for path in root.glob(self.pattern) if path.is_file())
        paths = sorted(path for path in inside if not any(p.startswith(".") for p in path.relative_to(root).parts))
        if not paths:
            raise DataError(f"The folder {self.path!r} holds no file that matches {self.pattern!r}.")
        return paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts(Source):
    """Documents that are already in Python: a list, a Hugging Face dataset, or a function that returns an iterable.

    Args:
        texts: Strings or records. A generator can be read only once; give the function that makes it instead.
        field: The field of a record that holds its text.
    """

    texts: Any
    field: str = "text"

    def documents(self) -> Iterator[str]:
        """Yield the text of every item."""
        items = self.texts() if callable(self.texts) else self.texts
        for number, item in enumerate(items):
            if text := text_of(item, self.field, Place("", f"item {number}")):
                yield text

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """Digest of the text, or the dataset's own; None where the items can be read only once."""
        if isinstance(self.texts, Iterator):
            return None
        known = getattr(self.texts, "_fingerprint", None)
        if isinstance(known, str):
            return hashlib.sha256(f"{known}:{self.field}".encode()).hexdigest()
        digest = hashlib.sha256()
        for text in self.documents():
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Source):
    """Several sources of which each gives its share of the training rows, whatever their sizes.

    Args:
        sources: The sources.
        weights: One positive number per source; only their ratios matter. Left out, all are equal.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.sources or (self.weights and len(self.weights) != len(self.sources)):
            raise ConfigurationError(
                "A mixture needs at least one source and one weight for each, got "
                f"{len(self.sources)} sources and {len(self.weights)} weights."
            )

    def documents(self) -> Iterator[str]:
        """Yield the documents of one source after the other, each once: weights are for rows."""
        for source in self.sources:
            yield from source.documents()

    @property
    def fingerprint(self) -> str | None:
        """Digest of the sources' fingerprints."""
        inner = [source.fingerprint for source in self.sources]
        return None if None in inner else hashlib.sha256(repr(inner).encode()).hexdigest()

    @property
    def num_bytes(self) -> int | None:
        """Bytes of all sources together, if each knows its own."""
        sizes = [source.num_bytes for source in self.sources]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def as_source(value: "Source | str | Path | Iterable[Any] | Callable[[], Iterable[Any]]") -> Source:
    """Return the source that something stands for.

    Args:
        value: A source, the path of a file or folder, an iterable of texts or records, or a function that returns one.

    Raises:
        DataError: If the value is none of these.
    """
    if isinstance(value, Source):
        return value
    if isinstance(value, str | os.PathLike):
        return Files(path=os.fspath(value))
    if callable(value) or isinstance(value, Iterable):
        return Texts(texts=value)
    raise DataError(
        f"{type(value).__name__} is no text source; pass a path, a Source, or an iterable of strings or records."
    )


def digest_of_files(paths: list[Path], root: Path, *how: object) -> str:
    """Return a digest of names, sizes and times of change, and of how the files are read."""
    digest = hashlib.sha256(repr(how).encode())
    for path in paths:
        status = path.stat()
        name = path.relative_to(root).as_posix() if path != root else path.name
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _report(root: Path, skipped: list[str]) -> None:
    if not skipped:
        return
    names = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
    warnings.warn(f"Skipped {len(skipped)} file(s) of {root} that are binary or not UTF-8: {names}", stacklevel=2)

"""Sources of documents. A source is a value that YAML can name; it is read again whenever its text is needed."""

import dataclasses
import functools
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from lightning_lm.data.decoding import UndecodableError, check_encoding, decoded, is_wide_encoding
from lightning_lm.data.files import read_record_texts, read_text, text_of
from lightning_lm.data.formats import BINARY, TEXTUAL, Format, foreign, format_of
from lightning_lm.data.paths import find_files, looks_like_path, roots_of
from lightning_lm.data.records import BadRecords, NotJSONError, OnBadRecord, Place, read_values
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.parts import Limit, Part

__all__ = ["Files", "Mixture", "Source", "Texts", "as_source"]

_READER = 2
"""Counted up when the same files give other documents, so that tokens of an older version are not reused."""
_READ_WHOLE = 1 << 26
"""Files of a folder up to this size are decoded before their first document is given; one larger fails when read."""
_DECLARED = (".jsonl", ".ndjson", ".parquet", ".arrow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(Part):
    """Base of the places documents come from."""

    def documents(self) -> Iterator[str]:
        """Yield every document, in an order that does not change. Starts again at each call."""
        raise NotImplementedError

    def token_documents(self, eos_id: int | None) -> Iterator[NDArray[Any]] | None:  # noqa: ARG002
        """Return the token ids of each document, for a source that has ids and no text; else None.

        Args:
            eos_id: The id that ends a document, which is not part of the document.
        """
        return None

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
    """Files, or all files of folders, each read by its content.

    JSON lines, JSON arrays, CSV, Parquet and Arrow files (as `datasets` saves them) give the text of each record; any
    other text is split at the separator or one document. gzip, Zstandard, xz and bzip2 are unpacked. In a folder,
    hidden files are skipped, and files that are no text, have another encoding, or are JSON without the field are
    skipped and named in a warning. A file that is damaged is an error, and so is any that was named itself.

    Args:
        path: File, folder, or pattern such as ``data/*.jsonl``; or several of them.
        separator: Text between documents of a text file; None keeps each file whole.
        field: The field of a record with its text.
        pattern: Glob of the files of a folder to read.
        encoding: Encoding of text files that are neither UTF-8 nor marked as UTF-16 or UTF-32.
        on_bad_record: Raise an error for a record without text, or skip and count it.
        format: ``text`` reads every file as plain text, JSON and CSV too.

    Raises:
        ConfigurationError: If there is no such encoding.
    """

    path: str | tuple[str, ...] = dataclasses.field(kw_only=False)
    separator: str | None = "<|endoftext|>"
    field: str = "text"
    pattern: str = "**/*"
    encoding: str | None = None
    on_bad_record: OnBadRecord = "raise"
    format: Literal["auto", "text"] = "auto"

    def __post_init__(self) -> None:
        check_encoding(self.encoding)

    def documents(self) -> Iterator[str]:
        """Yield the documents of each file, the files of a folder in the order of their names.

        Raises:
            DataError: If there is nothing to read, or a file or record cannot be read.
        """
        skips = f"--data.train Files --data.train.path {self._name} --data.train.on_bad_record skip"
        bad = BadRecords(self.on_bad_record, f"To skip and count such records: {skips}")
        skipped, num_files = dict[str, list[str]](), 0
        for root, path in self._files():
            num_files += 1
            reason = None if path == root else self._reason_to_skip(path)
            if reason is None:
                yield from self._read(path, bad)
            else:
                skipped.setdefault(reason, []).append(str(path.relative_to(root)))
        bad.report(self._name)
        self._report(skipped, num_files)

    @property
    def fingerprint(self) -> str | None:
        """Digest of names, sizes and times of change of the files, and of how they are read."""
        how = (_READER, self.separator, self.field, self.encoding, self.on_bad_record, self.format)
        roots: dict[Path, list[Path]] = {}
        for root, path in self._files():
            roots.setdefault(root, []).append(path)
        digests = [digest_of_files(paths, root, *how) for root, paths in roots.items()]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def num_bytes(self) -> int | None:
        """Bytes on disk, if no file is packed or columnar."""
        paths = [path for _, path in self._files()]
        if any(path.suffix in (".gz", ".zst", ".xz", ".bz2", ".parquet", ".arrow") for path in paths):
            return None
        return sum(path.stat().st_size for path in paths if path.exists())

    def _files(self) -> list[tuple[Path, Path]]:
        """Return each file once, with the root below which it was found."""
        return [(root, path) for root in roots_of(self.path) for path in find_files(root, self.pattern)]

    def _format(self, path: Path) -> Format:
        found = format_of(path)
        is_wide = found.name == BINARY and is_wide_encoding(self.encoding)
        return Format("text") if is_wide or (self.format == "text" and found.name in TEXTUAL) else found

    def _read(self, path: Path, bad: BadRecords) -> Iterator[str]:
        found = self._format(path)
        if found.remedy is not None:
            raise foreign(path, found)
        if found.name == "text":
            return read_text(path, self.separator, self.encoding)
        return read_record_texts(path, self.field, bad, self.encoding)

    def _reason_to_skip(self, path: Path) -> str | None:
        """Return why a file that was found in a folder is not read, if it is not."""
        if not path.exists():
            return "a link to nothing"
        found = self._format(path)
        if found.remedy is not None:
            return found.name
        if path.stat().st_size > _READ_WHOLE or path.suffix in _DECLARED:
            return None
        try:
            if found.name == "text":
                any(False for _ in decoded(path, self.encoding))
            elif not self._has_field(path):
                return f"{found.name} without the field {self.field!r}"
        except UndecodableError as error:
            return f"text in another encoding, perhaps {error.guess}"
        except NotJSONError:
            return "JSON that cannot be parsed"
        return None

    def _has_field(self, path: Path) -> bool:
        values = read_values(path, BadRecords("skip"), encoding=self.encoding, field=self.field)
        records = [record for _, record in itertools.islice(values, 8)]
        return not records or any(isinstance(record, str) or self.field in record for record in records)

    @property
    def _name(self) -> str:
        return ", ".join(map(str, self.path)) if isinstance(self.path, tuple | list) else str(self.path)

    def _report(self, skipped: dict[str, list[str]], num_files: int) -> None:
        if not skipped:
            return
        count = sum(map(len, skipped.values()))
        listed = "".join(f"\n  {reason}: {', '.join(names)}" for reason, names in sorted(skipped.items()))
        message = f"Skipped {count} of {num_files} file(s) of {self._name}:{listed}"
        message += "\nencoding= names an encoding, field= the field of a record, and format='text' reads JSON and CSV "
        message += f"as plain text (--data.train Files --data.train.path {self._name} --data.train.encoding cp1252)."
        if count == num_files:
            raise DataError(message)
        warnings.warn(message, stacklevel=2)


_NOT_TEXTS = {
    "str": "put it into a list, or name a file with Files(path=...)",
    "bytes": "decode it, and put it into a list",
    "dict": "pass the list of one of its values",
    "DatasetDict": "pass one of its splits, such as dataset['train']",
    "IterableDatasetDict": "pass one of its splits, such as dataset['train']",
    "DataFrame": "pass a column, such as frame['text'], or frame.to_dict('records')",
    "Table": "pass table.to_pylist()",
    "ndarray": "for token ids make a token store: write_store(ids, documents, folder)",
    "Tensor": "for token ids make a token store: write_store(ids, documents, folder)",
}
"""Things that can be iterated and give something else than texts: letters, names of columns, numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts(Source):
    """Documents that are already in Python: a list, a Hugging Face dataset, or a function that returns an iterable.

    Args:
        texts: Strings or records. A generator can be read only once; give the function that makes it instead.
        field: The field of a record with its text.
        on_bad_record: Raise an error for an item without text, or skip and count it.

    Raises:
        DataError: If the texts are one text, a dictionary or a table, of which the parts are no texts.
    """

    texts: Any = dataclasses.field(kw_only=False)
    field: str = "text"
    on_bad_record: OnBadRecord = "raise"

    def __post_init__(self) -> None:
        if advice := _NOT_TEXTS.get(type(self.texts).__name__):
            raise DataError(f"A {type(self.texts).__name__} is no list of texts: {advice}.")

    def documents(self) -> Iterator[str]:
        """Yield the text of every item.

        Raises:
            DataError: If an item has no text.
        """
        bad = BadRecords(self.on_bad_record, "To skip and count such items: Texts(..., on_bad_record='skip').")
        items = self.texts() if callable(self.texts) else self.texts
        for number, item in enumerate(items):
            try:
                text = text_of(item, self.field, Place("", f"item {number}"))
            except DataError as error:
                bad.add(error)
                continue
            if text:
                yield text
        bad.report("the texts")

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
class Mixture(Source, limits={"weights": Limit.POSITIVE}):
    """Several sources, each with its fraction of the training rows, whatever their sizes.

    Args:
        sources: The sources.
        weights: One positive number per source; only their ratios matter. By default all are equal.
    """

    sources: tuple[Source, ...] = dataclasses.field(kw_only=False)
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources or (self.weights and len(self.weights) != len(self.sources)):
            raise ConfigurationError(
                "A mixture needs at least one source and one weight for each, got "
                f"{len(self.sources)} sources and {len(self.weights)} weights."
            )

    def documents(self) -> Iterator[str]:
        """Yield the documents of one source after the other, each once: weights are for rows."""
        for source in self.sources:
            yield from source.documents()

    def token_documents(self, eos_id: int | None) -> Iterator[NDArray[Any]] | None:
        """Return the token ids of one source after the other, if they have ids.

        Args:
            eos_id: The id that ends a document, which is not part of the document.

        Raises:
            DataError: If some sources have ids and some have text.
        """
        parts = [source.token_documents(eos_id) for source in self.sources]
        found = [part for part in parts if part is not None]
        if 0 < len(found) < len(parts):
            raise DataError("Sources of text and of token ids cannot be read as one; tokenize the text first.")
        return itertools.chain.from_iterable(found) if found else None

    @property
    def fingerprint(self) -> str | None:
        """Digest of the sources' fingerprints."""
        inner = [source.fingerprint for source in self.sources]
        return None if None in inner else hashlib.sha256(repr(inner).encode()).hexdigest()

    @property
    def num_bytes(self) -> int | None:
        """Bytes of all sources together, if each has a known size."""
        sizes = [source.num_bytes for source in self.sources]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def as_source(value: "Source | str | Path | Iterable[Any] | Callable[[], Iterable[Any]]") -> Source:
    """Return the source that something stands for.

    Args:
        value: A source, the path of a file or folder or a list of paths, an iterable of texts or records, or a function
            that returns one.

    Raises:
        DataError: If the value is none of these.
    """
    if isinstance(value, Source):
        return value
    if isinstance(value, str | os.PathLike):
        return Files(path=os.fspath(value))
    if isinstance(value, list | tuple) and value and all(_names_file(item) for item in value):
        return Files(path=tuple(os.fspath(item) for item in value))
    if callable(value) or isinstance(value, Iterable):
        return Texts(texts=value)
    raise DataError(
        f"{type(value).__name__} is no text source; pass a path, a Source, or an iterable of strings or records."
    )


def _names_file(item: Any) -> bool:
    return isinstance(item, os.PathLike) or (isinstance(item, str) and looks_like_path(item))


def digest_of_files(paths: list[Path], root: Path, *how: object) -> str:
    """Return a digest of names, sizes and times of change, and of how the files are read."""
    digest = hashlib.sha256(repr(how).encode())
    for path in paths:
        status = path.stat() if path.exists() else path.lstat()
        name = path.relative_to(root).as_posix() if path != root else path.name
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()

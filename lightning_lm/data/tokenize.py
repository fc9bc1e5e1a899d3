"""Turning documents into a token store: in parallel, once, and from where it stopped if it was stopped.

A chunk's tokens are a file named after a digest of its text, so a run that was killed finds its finished chunks again.
The store is put together beside its place and renamed into it: it is there as a whole or not at all.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lightning_lm.data.shards import chunks_of, encode_chunks, read_shard
from lightning_lm.data.sources import Source, as_source
from lightning_lm.data.store import TokenStore, token_dtype, write_shards
from lightning_lm.data.tokens import begin_id, token_shards
from lightning_lm.errors import DataError, FingerprintError
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import locked, rename
from lightning_lm.tokenizers.word_counts import num_cores

__all__ = ["tokenize"]

_DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def tokenize(
    source: Source | str | Path | Iterable[Any],
    tokenizer: Tokenizer,
    out: Path | str,
    *,
    num_workers: int | None = None,
    show_progress: bool = True,
    overwrite: bool = False,
) -> TokenStore:
    """Write the tokens of a source into a folder, or open it if they are there already.

    Each document becomes its tokens and, if the tokenizer has one, the end-of-text token.

    Args:
        source: A path, a `Source`, or an iterable of strings or of records with a text.
        tokenizer: Makes the tokens.
        out: The folder of the store.
        num_workers: Processes that tokenize; by default one per core.
        show_progress: Draw a progress bar on standard error.
        overwrite: Replace the content of ``out`` if it is damaged or of something else.

    Raises:
        DataError: If there is no text, or the disk is full. Finished parts stay and are used by the next call.
        FingerprintError: If ``out`` has the tokens of another source or tokenizer.
    """
    job = _Job(as_source(source), tokenizer, Path(out), overwrite)
    if (store := job.finished()) is not None and not job.folder.exists():
        return store
    try:
        with locked(job.folder):
            if (store := job.finished()) is None:
                store = job.run(num_workers or num_cores(), show_progress)
            shutil.rmtree(job.folder, ignore_errors=True)
    except OSError as error:
        raise _explained(error, job.out) from error
    return store


@dataclasses.dataclass(frozen=True)
class _Job:
    source: Source
    tokenizer: Tokenizer
    out: Path
    overwrite: bool

    @property
    def folder(self) -> Path:
        """Folder of finished chunks until the store is complete."""
        return self.out.with_name(f"{self.out.name}.partial")

    def meta(self) -> dict[str, Any]:
        """Return the provenance in the store's ``meta.json``."""
        return {
            "dtype": token_dtype(self.tokenizer.vocab_size).name,
            "vocab_size": self.tokenizer.vocab_size,
            "eos_id": self.tokenizer.eos_id,
            "bos_id": begin_id(self.tokenizer),
            "tokenizer": self.tokenizer.fingerprint,
            "source": self._source_fingerprint(),
        }

    def _source_fingerprint(self) -> str | None:
        with _reading(self.source):
            return self.source.fingerprint

    def finished(self) -> TokenStore | None:
        """Return the store in ``out``, if it is what this job would write."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return None
        try:
            store, meta = TokenStore(self.out), self.meta()
        except DataError:
            if self.overwrite:
                return None
            raise
        if meta["source"] is not None and all(store.meta.get(key) == value for key, value in meta.items()):
            return store
        if self.overwrite:
            return None
        what = "another tokenizer" if store.meta["tokenizer"] != meta["tokenizer"] else "another text"
        if meta["source"] is None and what == "another text":
            what = "a text that cannot be compared with this one, which can be read only once"
        raise FingerprintError(
            f"{self.out} already has a token store made with {what}. "
            "Choose another folder, delete this one, or pass overwrite=True."
        )

    def run(self, num_workers: int, show_progress: bool) -> TokenStore:
        """Tokenize the chunks without a shard, concatenate the shards, and move the store into its place."""
        store, meta = self.folder / "store", self.meta()
        shutil.rmtree(store, ignore_errors=True)
        try:
            with _progress(self.source.num_bytes, show_progress) as advance:
                write_shards(store, self._shards(num_workers, advance), meta, num_bytes=lambda: advance.total)
            if self.out.exists():
                self.out.rename(self.folder / f"replaced.{os.getpid()}")
            rename(store, self.out)
        finally:
            shutil.rmtree(store, ignore_errors=True)
        return TokenStore(self.out)

    def _shards(self, num_workers: int, advance: "_Counter") -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Return the tokens and lengths of documents: those that are there already, or those of their text."""
        with _reading(self.source):
            documents = self.source.token_documents(self.tokenizer.eos_id)
        if documents is not None:
            return _counted(token_shards(documents, self.tokenizer), advance)
        paths: list[Path] = []
        chunks = chunks_of(_documents(self.source), salt=self.tokenizer.fingerprint)
        for path, num_bytes in encode_chunks(chunks, self.tokenizer, self.folder, num_workers):
            paths.append(path)
            advance(num_bytes)
        return (read_shard(path, token_dtype(self.tokenizer.vocab_size)) for path in paths)


def _counted(
    shards: Iterator[tuple[NDArray[Any], NDArray[np.int64], int]], advance: "_Counter"
) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    for tokens, lengths, num_bytes in shards:
        advance(num_bytes)
        yield tokens, lengths


class _Counter:
    """Adds up the bytes that are done and shows them."""

    def __init__(self, progress: Progress, size: int | None) -> None:
        self.total = 0
        self._progress = progress
        self._begin = time.monotonic()
        self._task = progress.add_task("Tokenizing", total=size, rate="")

    def __call__(self, num_bytes: int) -> None:
        self.total += num_bytes
        megabytes = self.total / 1e6
        rate = megabytes / max(time.monotonic() - self._begin, 1e-6)
        self._progress.update(self._task, completed=self.total, rate=f"{megabytes:.1f} MB, {rate:.1f} MB/s")

    def finish(self) -> None:
        self._progress.update(self._task, total=self.total, completed=self.total)


@contextlib.contextmanager
def _progress(size: int | None, show: bool) -> Iterator[_Counter]:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not show) as progress:
        counter = _Counter(progress, size)
        yield counter
        counter.finish()


@contextlib.contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Name the source if it cannot be read: other failures are of the output."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read: {error.strerror or error}.") from error


def _documents(source: Source) -> Iterator[str]:
    with _reading(source):
        yield from source.documents()


def _explained(error: OSError, out: Path) -> DataError:
    if error.errno in _DISK_FULL:
        return DataError(
            f"The disk is full, so {out} was not written ({error.strerror}). Free some space or choose another folder; "
            f"what was finished is kept in {out}.partial and the next call resumes from there."
        )
    return DataError(f"{out} cannot be written: {error.strerror or error}.")

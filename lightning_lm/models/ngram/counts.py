"""Counts of n-grams in sorted tables, streamed: chunks are sorted, summed, and merged on disk where they are many.

Memory is bounded by the buffer, whatever the length of the corpus, if a folder for the tables is given. The corpus is
read once for each order: the codes of an order are made of rows of the table below it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lm.models.ngram.codes import CHUNK, find, insert_starts

__all__ = ["Documents", "Workspace", "count_ngrams"]

Documents = tuple[NDArray[Any], NDArray[np.int64]]
"""Token ids of documents one after the other, and where each ends; see `lightning_lm.data.TokenStore`."""

_BUFFER = 1 << 24
"""Entries that are sorted in memory, 16 bytes each."""


@dataclass
class Workspace:
    """Place of arrays that may be larger than memory.

    Args:
        folder: Folder of memory-mapped files, which the caller removes; ``None`` for arrays in memory.
        buffer: Entries that are merged in memory before they are written to the folder.
    """

    folder: Path | None = None
    buffer: int = _BUFFER
    _names: Iterator[int] = field(default_factory=itertools.count)

    def array(self, size: int, dtype: Any) -> NDArray[Any]:
        """Return a new array of one dimension, filled with zeros.

        Args:
            size: Number of elements.
            dtype: Their type.
        """
        if self.folder is None or not size:
            return np.zeros(size, dtype)
        path = self.folder / f"{next(self._names)}.npy"
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=(size,))

    def copy(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return an array with the same values.

        Args:
            values: One dimension.
        """
        kept = self.array(len(values), values.dtype)
        kept[:] = values
        return kept


def count_ngrams(
    parts: Iterable[Documents],
    order: int,
    vocab_size: int,
    workspace: Workspace,
    advance: Callable[[int], None] = lambda _: None,
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return sorted codes and their counts for each order.

    The first table has a row for every symbol, also for those that do not occur.

    Args:
        parts: Documents, for instance of one or several token stores.
        order: Symbols of the longest n-gram.
        vocab_size: Number of token ids; the id behind the last one starts a document.
        workspace: Place of the tables.
        advance: Is told how many symbols have been read, ``order`` times the length of the text in the end.
    """
    base = vocab_size + 1
    texts = [_text(tokens, ends, vocab_size, workspace) for tokens, ends in parts]
    rows = [workspace.array(len(text), np.int64) for text in texts]
    totals = np.zeros(base, np.int64)
    for text, row in zip(texts, rows, strict=True):
        for span in _chunks(len(text)):
            row[span] = text[span]
            totals += np.bincount(row[span], minlength=base)
            advance(len(row[span]))
    tables = [(np.arange(base), totals)]
    for length in range(2, order + 1):
        sorter = _Sorter(workspace)
        for text, row in zip(texts, rows, strict=True):
            for _, codes in _codes(text, row, base):
                sorter.add(codes[codes >= 0])
                advance(len(codes))
        tables.append(sorter.finish())
        if length < order:
            for text, row in zip(texts, rows, strict=True):
                for span, codes in _codes(text, row, base):
                    row[span] = find(tables[-1][0], codes)
    return tables


def _text(tokens: NDArray[Any], ends: NDArray[np.int64], start: int, workspace: Workspace) -> NDArray[np.uint32]:
    text = workspace.array(len(tokens) + len(ends), np.uint32)
    done = first = 0
    while first < len(ends):
        begin = int(ends[first - 1]) if first else 0
        last = max(int(np.searchsorted(ends, begin + CHUNK, side="right")), first + 1)
        piece = insert_starts(tokens[begin : ends[last - 1]], ends[first:last] - begin, start)
        text[done : done + len(piece)] = piece
        done, first = done + len(piece), last
    return text


def _chunks(length: int) -> Iterator[slice]:
    return (slice(begin, min(begin + CHUNK, length)) for begin in range(0, length, CHUNK))


def _codes(text: NDArray[np.uint32], rows: NDArray[np.int64], base: int) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Yield the codes of the n-grams that end in each part of a text, -1 if a document is not that long yet.

    ``rows`` may be overwritten in the part that was yielded.
    """
    before = -1
    for span in _chunks(len(text)):
        symbols = text[span].astype(np.int64)
        prefixes = np.concatenate((np.array([before]), rows[span][:-1]))
        before = int(rows[span][-1])
        yield span, np.where((symbols == base - 1) | (prefixes < 0), -1, prefixes * base + symbols)


class _Sorter:
    """Codes in any order become sorted codes with counts."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._fresh: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._written: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def add(self, codes: NDArray[np.int64]) -> None:
        self._fresh.append(np.unique(codes, return_counts=True))
        if sum(len(codes) for codes, _ in self._fresh) > self._workspace.buffer:
            self._fresh = [_summed(self._fresh)]
            if len(self._fresh[0][0]) > self._workspace.buffer // 2 and self._workspace.folder is not None:
                self._written.append(self._kept(self._fresh.pop()))

    def finish(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return all codes once, sorted, with their counts."""
        if not self._written:
            return self._kept(_summed(self._fresh))
        if self._fresh:
            self._written.append(self._kept(_summed(self._fresh)))
        bound = sum(len(codes) for codes, _ in self._written)
        codes, counts = self._workspace.array(bound, np.int64), self._workspace.array(bound, np.int64)
        size = 0
        for some_codes, some_counts in _merged(self._written, self._workspace.buffer // len(self._written) or 1):
            codes[size : size + len(some_codes)], counts[size : size + len(some_codes)] = some_codes, some_counts
            size += len(some_codes)
        return codes[:size], counts[:size]

    def _kept(self, run: tuple[NDArray[np.int64], NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self._workspace.copy(run[0]), self._workspace.copy(run[1])


def _summed(runs: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the codes of several runs, sorted, each once with the sum of its counts."""
    if not runs:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if len(runs) == 1:
        return runs[0]
    codes = np.concatenate([codes for codes, _ in runs])
    order = np.argsort(codes, kind="stable")  # merges runs that are sorted already
    codes = codes[order]
    firsts = np.flatnonzero(np.concatenate((np.ones(min(len(codes), 1), bool), codes[1:] != codes[:-1])))
    counts = np.concatenate([counts for _, counts in runs])[order]
    return codes[firsts], np.add.reduceat(counts, firsts) if len(firsts) else counts


def _merged(
    runs: list[tuple[NDArray[np.int64], NDArray[np.int64]]], block: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield sorted parts of the union of sorted runs, of which a block each is in memory."""
    places = [0] * len(runs)
    while any(place < len(codes) for place, (codes, _) in zip(places, runs, strict=True)):
        # Codes up to the smallest end of a block that has a successor are complete in the blocks.
        limits = [
            int(codes[min(place + block, len(codes)) - 1])
            for place, (codes, _) in zip(places, runs, strict=True)
            if place < len(codes)
        ]
        taken = []
        for index, (codes, counts) in enumerate(runs):
            window = codes[places[index] : places[index] + block]
            size = int(np.searchsorted(window, min(limits), side="right"))
            taken.append((window[:size], counts[places[index] : places[index] + size]))
            places[index] += size
        yield _summed(taken)

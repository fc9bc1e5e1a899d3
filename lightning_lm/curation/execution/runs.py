"""Sorted runs on disk: entries that come in any order, found again by ranges of their ids.

A unit of work writes its entries in runs of bounded size, each sorted by id, with the ids and places of the entries
beside it. A shard is a range of ids: it reads its part of each run, wherever the unit that wrote it stood in the input.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

__all__ = ["RunWriter", "ids_of", "read_range", "shard_bounds"]

_RUN_BYTES = 1 << 25
_END = 1 << 64


def ids_of(identifiers: Sequence[str]) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    """Return the first 64 bits of ids as numbers.

    Args:
        identifiers: Ids of documents.
    """
    return np.array([int(identifier[:16], 16) for identifier in identifiers], dtype=np.uint64)


class RunWriter:
    """Writer of the sorted runs of one unit.

    Args:
        folder: Folder of the unit, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: list[tuple[str, bytes]] = []
        self._num_bytes = 0
        self._num_runs = 0

    def add(self, identifier: str, line: bytes) -> None:
        """Add an entry.

        Args:
            identifier: Id of the document.
            line: The entry, without a line break.
        """
        self._entries.append((identifier, line))
        self._num_bytes += len(line)
        if self._num_bytes >= _RUN_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the entries that are in memory as a run."""
        if not self._entries:
            return
        self._entries.sort()
        name = self._folder / f"run-{self._num_runs:04d}"
        offsets = np.zeros(len(self._entries) + 1, dtype=np.int64)
        np.cumsum([len(line) + 1 for _, line in self._entries], out=offsets[1:])
        np.save(name.with_suffix(".ids.npy"), ids_of([identifier for identifier, _ in self._entries]))
        np.save(name.with_suffix(".offsets.npy"), offsets)
        with name.with_suffix(".jsonl").open("wb") as file:
            file.writelines(part for _, line in self._entries for part in (line, b"\n"))
        self._entries, self._num_bytes = [], 0
        self._num_runs += 1


def shard_bounds(index: int, count: int) -> tuple[int, int]:
    """Return the first id of a shard and the first one after it, as numbers of 64 bits.

    Args:
        index: Index of the shard.
        count: Number of shards.
    """
    return _END * index // count, _END * (index + 1) // count


def read_range(folder: Path, bounds: tuple[int, int]) -> Iterator[bytes]:
    """Yield the entries of a unit whose ids are in a range.

    Args:
        folder: Folder of the unit.
        bounds: First id, and the first one after the range.
    """
    for path in sorted(folder.glob("run-*.jsonl")):
        ids = np.load(path.with_suffix(".ids.npy"), mmap_mode="r")
        first = int(np.searchsorted(ids, np.uint64(bounds[0])))
        last = len(ids) if bounds[1] >= _END else int(np.searchsorted(ids, np.uint64(bounds[1])))
        if first == last:
            continue
        offsets = np.load(path.with_suffix(".offsets.npy"), mmap_mode="r")
        with path.open("rb") as file:
            file.seek(int(offsets[first]))
            yield from file.read(int(offsets[last]) - int(offsets[first])).splitlines()

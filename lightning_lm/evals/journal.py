"""Journal of an evaluation: what was asked so far, beside the output, so that a broken run goes on."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from lightning_lm.evals.results import ItemResult
from lightning_lm.storage.json_text import parse_json

__all__ = ["Journal"]


class Journal:
    """One line of JSON for each block of items; a line that a kill has cut is not read.

    A journal of another model or of other settings is begun anew.

    Args:
        output: File of the results; the journal lies beside it, with ``.journal`` behind its name.
        run: Model and settings; blocks of a journal with the same ones are used again.
    """

    def __init__(self, output: Path, run: Mapping[str, Any]) -> None:
        self.path = output.with_name(f"{output.name}.journal")
        self._run: Any = parse_json(json.dumps(run))
        self._blocks: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        length = self._read()
        self._file = self.path.open("r+b" if self.path.exists() else "wb")
        self._file.truncate(length)
        self._file.seek(length)
        if length == 0:
            self._write({"run": self._run})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def recall(self, fingerprint: str, start: int, count: int) -> list[ItemResult] | None:
        """Return the results of a block, if the journal has them.

        Args:
            fingerprint: Fingerprint of the task.
            start: Index of the first item.
            count: Items of the block.
        """
        known = self._blocks.get((fingerprint, start))
        return [ItemResult(**item) for item in known] if known is not None and len(known) == count else None

    def record(self, fingerprint: str, start: int, items: Sequence[ItemResult]) -> None:
        """Write the results of a block, to the disk.

        Args:
            fingerprint: Fingerprint of the task.
            start: Index of the first item.
            items: Results of its items.
        """
        self._write({"task": fingerprint, "start": start, "items": [dataclasses.asdict(item) for item in items]})

    def remove(self) -> None:
        """Remove the file: the results are written."""
        self.path.unlink(missing_ok=True)

    def _write(self, entry: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> int:
        """Read the blocks of an earlier run; return the bytes that can be used."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if not lines or _parsed(lines[0]) != {"run": self._run}:
            return 0
        used = len(lines[0])
        for line in lines[1:]:
            entry = _parsed(line)
            if entry is None:
                break
            self._blocks[entry["task"], entry["start"]] = entry["items"]
            used += len(line)
        return used


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line.decode()) if line.endswith(b"\n") else None
    except ValueError:
        return None

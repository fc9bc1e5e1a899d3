"""The ledger of runs: a text file to which several processes add finished runs, and from which none is lost."""

import contextlib
import errno
import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning_lm.errors import DataError
from lightning_lm.scaling.record import RunRecord

__all__ = ["BadLine", "RunLedger"]

_ID = re.compile(rb'"id": ?"([0-9a-f]{16})"')
_WRITTEN = re.compile(rb'\{"hash": "[0-9a-f]{16}", "run": (?P<run>\{.*\})\}')
_FEW = 8
"""Runs to add for which the file is searched one by one; for more, all ids in it are collected first."""


class BadLine(NamedTuple):
    """A line that cannot be read, for instance what a killed process left."""

    number: int
    """From 1."""
    reason: str


class RunLedger:
    """Runs as lines of JSON, only ever appended to, under a lock, each with a hash of its content.

    A process that dies while it writes leaves at most its own half line, which later readers name and pass over; the
    next writer starts a line of its own. Where the disk is full, what was written of a line is taken back.

    Args:
        path: The file; made with its folders when the first run is added.

    Example:
        >>> ledger = RunLedger("ledger.jsonl")
        >>> run = RunRecord(parameters={"total": 1e6}, flops_per_token={"total": 6e6}, tokens=10**7, loss=4.2)
        >>> ledger.add(run) == ledger.read()[0].id
        True
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __len__(self) -> int:
        return len(self.read())

    def __contains__(self, run: object) -> bool:
        return isinstance(run, RunRecord) and run.id in {record.id for record in self.read()}

    def read(self) -> list[RunRecord]:
        """Return every run that can be read, the oldest first."""
        return self.scan()[0]

    def scan(self) -> tuple[list[RunRecord], list[BadLine]]:
        """Return the runs, the oldest first, and the lines that cannot be read, in one pass."""
        runs, bad = [], []
        for number, found in _parsed(self._content()):
            if isinstance(found, RunRecord):
                runs.append(found)
            else:
                bad.append(BadLine(number, found))
        return runs, bad

    def bad_lines(self) -> list[BadLine]:
        """Return the lines that cannot be read, with what is wrong with them."""
        return self.scan()[1]

    def add(self, run: RunRecord) -> str:
        """Append a run, and return its id once it is on the disk.

        Args:
            run: The run.

        Raises:
            DataError: If the same run is there already, or the line cannot be written.
        """
        self.add_all([run])
        return run.id

    def add_all(self, runs: Iterable[RunRecord]) -> None:
        """Append several runs, all or none.

        Args:
            runs: The runs.

        Raises:
            DataError: If one of them is there already, or the lines cannot be written.
        """
        named = [(run.id, run, _line(run)) for run in runs]
        with self._locked() as descriptor:
            content = self._content()
            known = set(_ID.findall(content)) if len(named) > _FEW else None
            added = set[str]()
            for identity, run, _ in named:
                there = known is None or identity.encode() in known
                number = _line_with(identity, content) if there else None
                if number or identity in added:
                    where = f"line {number} of {self.path}" if number else "the runs to add, twice"
                    raise DataError(
                        f"The run {run.name or identity} is in {where}: the same settings, size and tokens. "
                        "Change a setting (the seed, for a repetition) or the name."
                    )
                added.add(identity)
            _append(descriptor, "".join(line for _, _, line in named).encode(), self.path)

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Open the file and wait until no other process holds it; a process that is killed lets go of it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise DataError(f"The ledger {self.path} cannot be opened: {error.strerror}. Name another file.") from error
        try:
            with contextlib.suppress(ModuleNotFoundError):  # Windows has no flock: nothing is waited for
                fcntl = importlib.import_module("fcntl")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def _line(run: RunRecord) -> str:
    content = json.dumps(run.to_dict(), sort_keys=True)
    return f'{{"hash": "{_hash(content)}", "run": {content}}}\n'


def _line_with(identity: str, content: bytes) -> int | None:
    """Return the number of the undamaged line with the run of this id; only lines that contain the id are parsed."""
    sought, start = f'"{identity}"'.encode(), 0
    while (found := content.find(sought, start)) >= 0:
        begin, end = content.rfind(b"\n", 0, found) + 1, content.find(b"\n", found)
        start = end if end >= 0 else len(content)
        record = _record(content[begin:start])
        if isinstance(record, RunRecord) and record.id == identity:
            return content.count(b"\n", 0, begin) + 1
    return None


def _hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _parsed(content: bytes) -> Iterator[tuple[int, RunRecord | str]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield number, _record(line)


def _record(line: bytes) -> RunRecord | str:
    """Return the run of a line, or what is wrong with it.

    The hash is that of the text as it was written; only a line that another program has laid out anew is laid out as
    before to compare it.
    """
    try:
        data: Any = json.loads(line)
        if not isinstance(data, dict) or not isinstance(data.get("run"), dict):
            return "it is no run of a ledger"
        written = _WRITTEN.fullmatch(line.strip())
        intact = written is not None and _hash(written["run"].decode()) == data.get("hash")
        if not intact and _hash(json.dumps(data["run"], sort_keys=True)) != data.get("hash"):
            return "its content has changed since it was written"
        return RunRecord.from_dict(data["run"])
    except ValueError as error:  # also of JSON, of UTF-8, and of a run that cannot be
        return f"it is cut short or damaged ({error})"


def _append(descriptor: int, data: bytes, path: Path) -> None:
    size = os.lseek(descriptor, 0, os.SEEK_END)
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        data = b"\n" + data  # behind what a killed process left
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
        os.fsync(descriptor)
    except OSError as error:
        os.ftruncate(descriptor, size)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else str(error.strerror)
        raise DataError(
            f"The run was not added to {path}: {what}. Earlier runs are safe; make room and retry."
        ) from error

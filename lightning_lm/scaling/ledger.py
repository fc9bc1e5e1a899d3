"""The ledger of runs and its records: a text file to which several processes add, and from which no run is lost."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from lightning_lm.errors import DataError
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN, Curve, Points
from lightning_lm.scaling.flop_conventions import check_convention
from lightning_lm.storage import lock_file
from lightning_lm.storage.json_text import parse_json

__all__ = ["BadLine", "RunLedger", "RunRecord", "curves_of", "points_of"]

_IDENTITY = ("name", "parameters", "tokens", "context_length", "hyper_parameters", "source")
"""Fields that identify a run. The rest (loss, seconds, versions) is its outcome."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, or one point of a run.

    Args:
        parameters: Known parameter counts of the model: ``total``, ``non_embedding``, ``embedding``, ``head``.
        flops_per_token: Training FLOPs by convention; see `lightning_lm.scaling.CONVENTIONS`.
        tokens: Trained on, repeated ones included.
        loss: Nats per token, of validation where there was one.
        unique_tokens: Different tokens among them; ``None`` where that is not known.
        context_length: Tokens of a row.
        curve: Tokens and loss along the run.
        wall_time_s: Seconds of training, evaluation left out.
        hyper_parameters: Plain data that tells this run from others: width, learning rate, batch size, seed, ...
        versions: Versions of Python and packages.
        name: Display name.
        source: Source of an imported run.
        finished: True if the run ended here; ``False`` for an intermediate point.
        loss_name: Name of the loss: ``val/loss``, or ``train/loss`` if nothing was held out.
        tasks: Scores of the final weights by the task's name, as `evals.TaskResults.summary` gives them.
    """

    parameters: Mapping[str, float]
    flops_per_token: Mapping[str, float]
    tokens: int
    loss: float
    unique_tokens: int | None = None
    context_length: int | None = None
    curve: tuple[tuple[float, float], ...] = ()
    wall_time_s: float | None = None
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    source: str = ""
    finished: bool = True
    loss_name: str = ""
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens", "loss"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise DataError(f"A run with {name}={value} cannot be recorded; it must be finite and positive.")

    @property
    def id(self) -> str:
        """A hash of what makes this run this run: the same settings give the same id, whatever came out."""
        identity = {name: getattr(self, name) for name in _IDENTITY}
        text = json.dumps(identity, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def flops(self, convention: str) -> float:
        """Return the FLOPs of training in a convention.

        Args:
            convention: A key of `CONVENTIONS`.
        """
        return self.flops_per_token[convention] * self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with the id."""
        return {"id": self.id, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the record that `to_dict` described; what a newer version has added is passed over.

        Args:
            data: Plain data.

        Raises:
            DataError: If something needed is missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in data.items() if name in known}
        missing = {"parameters", "flops_per_token", "tokens", "loss"} - set(fields)
        if missing:
            raise DataError(f"A run needs {', '.join(sorted(missing))} as well.")
        fields["curve"] = tuple((float(tokens), float(loss)) for tokens, loss in fields.get("curve", ()))
        return cls(**fields)


def points_of(records: Iterable[RunRecord], convention: str = "products", *, unfinished: bool = False) -> Points:
    """Return the points of a fit, sizes counted in one convention.

    Args:
        records: Records of a ledger.
        convention: A key of `CONVENTIONS`.
        unfinished: Also use intermediate points of runs; comparable only with a constant learning rate.

    Raises:
        DataError: If no run can be counted in this convention.
    """
    check_convention(convention)
    wanted = [record for record in records if unfinished or record.finished]
    usable = [record for record in wanted if convention in record.flops_per_token]
    if not usable:
        known = sorted({name for record in wanted for name in record.flops_per_token})
        raise DataError(
            f"Of {len(wanted)} finished runs none can be counted as {convention!r}. Known for them: {', '.join(known)}"
            "; choose one of these as the convention."
            if known
            else "The ledger holds no finished run: train with ScalingLaw, or take in a table with "
            "`lightning-lm scaling import`, first."
        )
    unique = [record.unique_tokens for record in usable]
    return Points.of(
        [record.flops_per_token[convention] / FLOPS_PER_PARAMETER_TOKEN for record in usable],
        [record.tokens for record in usable],
        [record.loss for record in usable],
        unique_tokens=None if None in unique else np.array(unique, dtype=float),
    )


def curves_of(records: Iterable[RunRecord], convention: str = "products") -> list[Curve]:
    """Return the loss curves of runs that have one.

    Args:
        records: Records of a ledger.
        convention: In which sizes are counted.
    """
    check_convention(convention)
    return [
        Curve(
            parameters=record.flops_per_token[convention] / FLOPS_PER_PARAMETER_TOKEN,
            tokens=np.array([tokens for tokens, _ in record.curve]),
            loss=np.array([loss for _, loss in record.curve]),
            name=record.name,
        )
        for record in records
        if record.finished and len(record.curve) > 1 and convention in record.flops_per_token
    ]


_ID = re.compile(rb'"id": ?"([0-9a-f]{16})"')
_WRITTEN = re.compile(rb'\{"hash": "[0-9a-f]{16}", "run": (?P<run>\{.*\})\}')
_FEW = 8
"""Runs to add for which the file is searched one by one; for more, all ids in it are collected first."""


class BadLine(NamedTuple):
    """A line that cannot be read, for instance one that a killed process left."""

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
        runs, bad, scores = list[RunRecord](), list[BadLine](), dict[str, dict[str, Any]]()
        for number, found in _parsed(self._content()):
            if isinstance(found, RunRecord):
                runs.append(found)
            elif isinstance(found, _Scores):
                scores.setdefault(found.run, {}).update(found.tasks)
            else:
                bad.append(BadLine(number, found))
        return [_with_scores(run, scores) for run in runs] if scores else runs, bad

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

    def add_scores(self, run: str, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        """Append scores of a run that is in the ledger; the newest ones of a task count.

        Args:
            run: Id of the run.
            tasks: Scores by the task's name, as in `RunRecord.tasks`.

        Raises:
            DataError: If there is no such run, or the line cannot be written.
        """
        content = json.dumps({"run": run, "tasks": tasks}, sort_keys=True)
        line = f'{{"hash": "{_hash(content)}", "scores": {content}}}\n'
        with self._locked() as descriptor:
            if _line_with(run, self._content()) is None:
                raise DataError(f"{self.path} has no run with the id {run!r}.")
            _append(descriptor, line.encode(), self.path)

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Open the file and wait until no other process holds it; a killed process releases it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise DataError(f"The ledger {self.path} cannot be opened: {error.strerror}. Name another file.") from error
        try:
            lock_file(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)


class _Scores(NamedTuple):
    """Scores that were added to a run."""

    run: str
    tasks: Mapping[str, Mapping[str, Any]]


def _with_scores(run: RunRecord, scores: Mapping[str, Mapping[str, Any]]) -> RunRecord:
    more = scores.get(run.id)
    return dataclasses.replace(run, tasks={**run.tasks, **more}) if more else run


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


def _parsed(content: bytes) -> Iterator[tuple[int, RunRecord | _Scores | str]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield number, _record(line)


def _record(line: bytes) -> RunRecord | _Scores | str:
    """Return the run of a line, or the scores that it adds to one, or what is wrong with it.

    The hash is that of the text as it was written; only a line that another program has reformatted is laid out as
    before to compare it.
    """
    try:
        data: Any = parse_json(line)
        if isinstance(data, dict) and isinstance(data.get("scores"), dict):
            intact = _hash(json.dumps(data["scores"], sort_keys=True)) == data.get("hash")
            return _Scores(**data["scores"]) if intact else "its content has changed since it was written"
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

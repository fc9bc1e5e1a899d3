"""Stages of a run: units of the input into sorted runs, then shards of the corpus through the rest of the steps.

The result of every task is a folder whose name is a digest of all that it depends on, and which gets that name when it
is complete. A run that was killed finds the folders of the one before, and there is nothing else to resume from. A
document's shard depends on its id alone and a shard is sorted by id, so neither the order of the input nor its division
into files shows in the output.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.execution.chain import Chain
from lightning_lm.curation.execution.entries import (
    document_of_line,
    line_of_document,
    line_of_removed,
    numbered,
    output_line,
)
from lightning_lm.curation.execution.runs import RunWriter, read_range, shard_bounds
from lightning_lm.curation.execution.statistics import Tally, utf8_length
from lightning_lm.curation.execution.units import Unit
from lightning_lm.curation.reading.outcome import Unreadable
from lightning_lm.curation.reading.reader import Reading
from lightning_lm.curation.step import Arrays
from lightning_lm.storage import discard, rename, temporary_for
from lightning_lm.storage.json_text import parse_json

__all__ = ["KEPT", "PART", "REMOVED", "SUMMARY", "ReadTask", "ShardTask", "TaskResult", "load_arrays"]

KEPT, PART, REMOVED, SUMMARY = "kept.jsonl", "part.jsonl", "removed.jsonl", "summary"
_RESULT = "result.json"
_SHOWN_UNREADABLE = 20


@dataclasses.dataclass
class TaskResult:
    """Counts of a finished task.

    Args:
        folder: Folder with its files.
        tallies: Tally of each step by name.
        unreadable: Records without a document by reason.
        examples: Some of them by reason: place and detail.
        documents: Documents after the task.
        num_bytes: Their lines, bytes.
        text_bytes: Their text, UTF-8 bytes; counted where documents are read.
        digest: SHA-256 of the part of the output that it wrote.
    """

    folder: Path
    tallies: dict[str, Tally]
    unreadable: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    documents: int = 0
    num_bytes: int = 0
    text_bytes: int = 0
    digest: str = ""

    def write(self, folder: Path) -> None:
        """Write the result into a folder.

        Args:
            folder: The folder, under its temporary name.
        """
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain |= {"folder": None, "tallies": {name: tally.to_dict() for name, tally in self.tallies.items()}}
        (folder / _RESULT).write_text(json.dumps(plain), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "TaskResult | None":
        """Return the result of a task that has finished, None if it has not.

        Args:
            folder: Folder of the task.
        """
        try:
            plain = parse_json((folder / _RESULT).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        tallies = {name: Tally.from_dict(tally) for name, tally in plain["tallies"].items()}
        return cls(**{**plain, "folder": folder, "tallies": tallies})


@dataclasses.dataclass(frozen=True)
class ReadTask:
    """Reading a unit of the input, and the steps before the first corpus step.

    Args:
        work: Folder of the results.
        reading: Settings of the readers.
        steps: The steps.
        names: Their names.
        digest: Digest of readers and steps.
    """

    work: Path
    reading: Reading
    steps: Sequence[Any]
    names: Sequence[str]
    digest: str

    def folder(self, unit: Unit) -> Path:
        """Return the folder of a unit's result.

        Args:
            unit: The unit.
        """
        return self.work / f"read-{hashlib.sha256((self.digest + unit.key).encode()).hexdigest()[:32]}"

    def __call__(self, unit: Unit) -> Path:
        """Read a unit if that has not been done; return the folder of the result.

        Args:
            unit: The unit.
        """
        folder = self.folder(unit)
        if TaskResult.read(folder) is None:
            with _new_folder(folder) as place:
                self._run(unit, place)
        return folder

    def _run(self, unit: Unit, folder: Path) -> None:
        chain, runs = Chain(self.steps, self.names), RunWriter(folder)
        result = TaskResult(folder, dict(zip(self.names, chain.tallies, strict=True)))
        for found in unit.documents(self.reading):
            if isinstance(found, Unreadable):
                result.unreadable[found.reason] = result.unreadable.get(found.reason, 0) + 1
                examples = result.examples.setdefault(found.reason, [])
                if len(examples) < _SHOWN_UNREADABLE:
                    examples.append((found.place, found.detail))
                continue
            outcome, name = chain(found)
            if isinstance(outcome, Removed):
                runs.add(outcome.document.id, line_of_removed(outcome, name))
            else:
                line = line_of_document(outcome)
                runs.add(outcome.id, line)
                result.documents += 1
                result.num_bytes += len(line)
                result.text_bytes += utf8_length(outcome.text)
        runs.flush()
        result.write(folder)


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard through a corpus step that has decided and the steps after it, up to the next corpus step.

    Args:
        work: Folder of the results.
        stage: Index of the stage.
        digest: Digest of the input and of all steps up to the end of the stage.
        before: Folders with the documents: of all units for the first stage, else of each shard.
        count: Number of shards.
        steps: The steps; the first has decided if there is a decision.
        names: Their names.
        next_step: Corpus step to summarize the shard for, if one follows; else the output is written.
        decision: File with the decision.
    """

    work: Path
    stage: int
    digest: str
    before: Sequence[Path]
    count: int
    steps: Sequence[Any]
    names: Sequence[str]
    next_step: Any = None
    decision: Path | None = None

    def folder(self, index: int) -> Path:
        """Return the folder of a shard's result.

        Args:
            index: Index of the shard.
        """
        return self.work / f"stage-{self.stage}-{self.digest[:24]}-{index:05d}"

    def __call__(self, index: int) -> Path:
        """Process a shard if that has not been done; return the folder of the result.

        Args:
            index: Index of the shard.
        """
        folder = self.folder(index)
        if TaskResult.read(folder) is None:
            with _new_folder(folder) as place:
                self._run(index, place)
        return folder

    def _run(self, index: int, folder: Path) -> None:
        decision = None if self.decision is None else load_arrays(self.decision)
        chain = Chain(self.steps, self.names, decision)
        result = TaskResult(folder, dict(zip(self.names, chain.tallies, strict=True)))
        kept: list[Document] = []
        digest = hashlib.sha256()
        write = output_line if self.next_step is None else _stage_line
        with (folder / REMOVED).open("wb") as removed, (folder / PART).open("wb") as part:
            for document in self._documents(index, removed):
                outcome, name = chain(document)
                if isinstance(outcome, Removed):
                    removed.write(line_of_removed(outcome, name) + b"\n")
                    continue
                line = write(outcome)
                part.write(line)
                digest.update(line)
                result.documents += 1
                result.num_bytes += len(line)
                if self.next_step is not None:
                    kept.append(outcome)
        result.digest = digest.hexdigest()
        if self.next_step is not None:
            np.savez(folder / SUMMARY, **self.next_step.summarize(kept))
        result.write(folder)

    def _documents(self, index: int, removed: Any) -> Iterator[Document]:
        """Yield the documents of a shard in the order of their ids; copy the lines of those removed before."""
        if self.stage > 0:
            before = self.before[index]
            removed.write((before / REMOVED).read_bytes())
            with (before / PART).open("rb") as file:
                for line in file:
                    document = document_of_line(line)
                    assert document is not None
                    yield document
            return
        lines = sorted(_keyed(self.before, shard_bounds(index, self.count)))
        documents = []
        for _, line in lines:
            document = document_of_line(line)
            if document is None:
                removed.write(line + b"\n")
            else:
                documents.append(document)
        yield from numbered(documents)


def _keyed(folders: Sequence[Path], bounds: tuple[int, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield lines with the ids at their beginnings."""
    for folder in folders:
        for line in read_range(folder, bounds):
            start = line.index(b'"', 6 if line[:1] == b"{" else 1)
            yield line[start : start + 34], line


def _stage_line(document: Document) -> bytes:
    return line_of_document(document) + b"\n"


def load_arrays(path: Path) -> Arrays:
    """Return the arrays of a file, in memory.

    Args:
        path: File of ``numpy.savez``.
    """
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


class _new_folder:  # noqa: N801
    """A folder that gets its name when all of its files are written."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._place = folder, temporary_for(folder)

    def __enter__(self) -> Path:
        discard(self._place)
        self._place.mkdir(parents=True)
        return self._place

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            discard(self._folder)
            rename(self._place, self._folder)
        else:
            discard(self._place)

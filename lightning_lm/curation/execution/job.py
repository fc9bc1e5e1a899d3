"""A run of a pipeline: units, stages, decisions, and the output that takes its place as a whole."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_lm.curation.execution.arrays import LazyArrays, write_arrays
from lightning_lm.curation.execution.duplicates import add_duplicates
from lightning_lm.curation.execution.fingerprint import fingerprint_of
from lightning_lm.curation.execution.progress import Show
from lightning_lm.curation.execution.stages import PART, SUMMARY, ReadTask, ShardTask, TaskResult
from lightning_lm.curation.execution.statistics import Tally
from lightning_lm.curation.execution.units import Unit
from lightning_lm.curation.reading.reader import Reading
from lightning_lm.curation.step import Arrays, CorpusStep, PartitionedStep
from lightning_lm.data.parallel import in_order
from lightning_lm.errors import DataError

__all__ = ["Job", "Outcome", "result_of", "summaries_of"]

_REMEDY = "Finished parts are kept: run it again, with fewer processes (num_workers) if it was memory."
_ALL_EXAMPLES = 20


@dataclasses.dataclass
class Outcome:
    """Everything that a run found.

    Args:
        tallies: Tally of each step by name, in the order of the steps.
        unreadable: Records without a document by reason.
        examples: Some of them by reason: place and detail.
        parts: Results of the last stage, in the order of the output.
        documents_read: Documents that were read.
        bytes_read: Their text or markup, bytes.
        bytes_kept: Text of the output, bytes.
    """

    tallies: dict[str, Tally]
    unreadable: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    parts: list[TaskResult] = dataclasses.field(default_factory=list)
    documents_read: int = 0
    bytes_read: int = 0
    bytes_kept: int = 0

    def add(self, result: TaskResult) -> None:
        """Add the counts of a task.

        Args:
            result: Result of the task.
        """
        for name, tally in result.tallies.items():
            self.tallies[name].merge(tally)
        for reason, count in result.unreadable.items():
            self.unreadable[reason] = self.unreadable.get(reason, 0) + count
            examples = self.examples.setdefault(reason, [])
            examples += result.examples[reason][: _ALL_EXAMPLES - len(examples)]

    def describe_unreadable(self) -> str:
        """Return a line for each reason for which records gave no document."""
        return "".join(
            f"\n  {count:,} x {reason}: {': '.join(filter(None, self.examples[reason][0]))}"
            for reason, count in sorted(self.unreadable.items())
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """The stages of a run on one machine.

    Args:
        steps: The steps.
        names: Their names.
        reading: Settings of the readers.
        work: Folder of intermediate results.
        num_workers: Processes.
        shard_bytes: Text of a shard, bytes.
        show: Display of the progress.
    """

    steps: Sequence[Any]
    names: Sequence[str]
    reading: Reading
    work: Path
    num_workers: int
    shard_bytes: int
    show: Show

    def read(self, units: Iterable[Unit]) -> tuple[list[TaskResult], list[str]]:
        """Read the input and run the steps before the first corpus step; return the results and the units' keys.

        Args:
            units: Units of the input; a list shows how much is left.
        """
        task = self.read_task()
        names = task.names
        total = sum(unit.num_bytes for unit in units) if isinstance(units, list) else None
        sizes, keys, results = list[int](), list[str](), list[TaskResult]()

        def noted() -> Iterator[Unit]:
            for unit in units:
                sizes.append(unit.num_bytes)
                keys.append(unit.key)
                yield unit

        with self.show.stage("Reading", total) as advance:
            for folder in self._map(task, noted()):
                results.append(result_of(folder))
                advance(sizes[len(results) - 1], _documents_in(results[-1], names), results[-1].documents)
        return results, keys

    def finish(self, units: Sequence[TaskResult]) -> Outcome:
        """Run the rest of the stages.

        Args:
            units: Results of `read`.

        Raises:
            DataError: If the input has no documents.
        """
        outcome = Outcome({name: Tally() for name in self.names})
        for unit in units:
            outcome.add(unit)
        if not any(_documents_in(unit, list(unit.tallies)) for unit in units):
            raise DataError(f"The input has no document.{outcome.describe_unreadable() or ' It is empty.'}")
        task = self.first_task(units)
        outcome.parts = self._shards(task, outcome)
        for number, begin in enumerate(self.corpus_steps, start=1):
            decision = self._decide(begin, outcome.parts, task)
            task = self.next_task(task, number, outcome.parts, decision)
            outcome.parts = self._shards(task, outcome)
            add_duplicates(outcome.tallies[self.names[begin]], task)
        self._add_totals(outcome, units)
        return outcome

    @property
    def corpus_steps(self) -> list[int]:
        """Indices of the steps that need the whole corpus."""
        return [index for index, step in enumerate(self.steps) if isinstance(step, CorpusStep)]

    def read_task(self) -> ReadTask:
        """Return the task that reads a unit and runs the steps before the first corpus step."""
        count = self.corpus_steps[0] if self.corpus_steps else len(self.steps)
        steps, names = self.steps[:count], self.names[:count]
        return ReadTask(self.work, self.reading, steps, names, _digest(self.reading, steps, names))

    def first_task(self, units: Sequence[TaskResult]) -> ShardTask:
        """Return the task that sorts the corpus into shards.

        Args:
            units: Results of all units.
        """
        count = max(1, -(-sum(unit.num_bytes for unit in units) // self.shard_bytes))
        folders = [unit.folder for unit in units]
        corpus = self.corpus_steps
        next_step = self.steps[corpus[0]] if corpus else None
        digest = _digest(sorted(folder.name for folder in folders), count, next_step)
        return ShardTask(self.work, 0, digest, folders, count, (), (), next_step)

    def next_task(self, before: ShardTask, number: int, results: Sequence[TaskResult], decision: Path) -> ShardTask:
        """Return the task of a corpus step that has decided and of the steps after it.

        Args:
            before: Task of the stage before.
            number: Index of the stage, from 1.
            results: Results of the stage before.
            decision: File with the decision.
        """
        corpus = [*self.corpus_steps, len(self.steps)]
        begin, end = corpus[number - 1], corpus[number]
        next_step = self.steps[end] if end < len(self.steps) else None
        return ShardTask(
            work=self.work,
            stage=number,
            digest=_digest(before.digest, self.steps[begin:end], next_step),
            before=[result.folder for result in results],
            count=before.count,
            steps=self.steps[begin:end],
            names=self.names[begin:end],
            next_step=next_step,
            decision=decision,
        )

    def _add_totals(self, outcome: Outcome, units: Sequence[TaskResult]) -> None:
        tallies = [outcome.tallies[name] for name in self.names]
        outcome.documents_read = tallies[0].documents_in if tallies else sum(unit.documents for unit in units)
        outcome.bytes_read = tallies[0].bytes_in if tallies else sum(unit.text_bytes for unit in units)
        outcome.bytes_kept = tallies[-1].bytes_out if tallies else outcome.bytes_read

    def _shards(self, task: ShardTask, outcome: Outcome) -> list[TaskResult]:
        name = task.names[0] if task.names else "Sorting"
        results = []
        sizes = [_size_of(path) for path in task.before] if task.stage else [1] * task.count
        with self.show.stage(name, sum(sizes)) as advance:
            for index, folder in enumerate(self._map(task, range(task.count))):
                result = result_of(folder)
                results.append(result)
                outcome.add(result)
                advance(sizes[index], _documents_in(result, task.names), result.documents)
        return results

    def decision_path(self, task: ShardTask) -> Path:
        """Return the file with the decision of the corpus step that a stage was summarized for.

        Args:
            task: Task of the stage.
        """
        return self.work / f"decision-{task.digest[:24]}.npz"

    def _decide(self, index: int, results: Sequence[TaskResult], task: ShardTask) -> Path:
        """Return the file with the decision of a corpus step, made of the summaries of all shards."""
        step: CorpusStep = self.steps[index]
        path = self.decision_path(task)
        if not path.exists():
            summaries = summaries_of(results)
            if isinstance(step, PartitionedStep):
                decide = functools.partial(_partial, step, summaries)
                with self.show.stage(f"{self.names[index]}: deciding", step.partitions) as advance:
                    partials = []
                    for arrays in self._map(decide, range(step.partitions)):
                        partials.append(arrays)
                        advance(1, 0, 0)
                decision = step.merge(partials)
            else:
                decision = step.decide(summaries)
            write_arrays(path, decision)
        return path

    def _map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return in_order(function, items, num_workers=self.num_workers, remedy=_REMEDY)


def summaries_of(results: Sequence[TaskResult]) -> list[Arrays]:
    """Return the summaries of shards, each of whose arrays is read when it is looked up.

    Args:
        results: Results of the shards.
    """
    return [LazyArrays(result.folder / f"{SUMMARY}.npz") for result in results]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(fingerprint_of(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _partial(step: PartitionedStep, summaries: Sequence[Arrays], index: int) -> dict[str, Any]:
    return dict(step.partial(summaries, index))


def result_of(folder: Path) -> TaskResult:
    """Return the result of a finished task.

    Args:
        folder: Folder of the task.

    Raises:
        DataError: If the task has not finished, or its folder was removed.
    """
    result = TaskResult.read(folder)
    if result is None:
        raise DataError(f"{folder} is missing: its task has not finished, or it was removed. Run it again, it resumes.")
    return result


def _documents_in(result: TaskResult, names: Sequence[str]) -> int:
    return result.tallies[names[0]].documents_in if names else result.documents


def _size_of(folder: Path) -> int:
    return (folder / PART).stat().st_size

"""Pipelines past one machine: the stages of a run as steps of datatrove, for its local, Slurm and Ray executors.

The tasks are those of `Pipeline.run`, on a folder that all machines share: units of the input, shards of the corpus,
parts of a decision. So the output is the same to the byte, no task has more than a shard or a part of the summaries in
memory, and a task that was killed is run again. `Steps` puts steps that look at one document into any pipeline of
datatrove.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document as DatatroveDocument
from datatrove.pipeline.base import PipelineStep

from lightning_lm.curation.document import Document, Removed, document_id
from lightning_lm.curation.execution.arrays import write_arrays
from lightning_lm.curation.execution.chain import Chain
from lightning_lm.curation.execution.job import Job, result_of, summaries_of
from lightning_lm.curation.execution.output import write_output
from lightning_lm.curation.execution.progress import Show
from lightning_lm.curation.execution.stages import ShardTask, TaskResult, load_arrays
from lightning_lm.curation.execution.units import Unit, units_of
from lightning_lm.curation.pipeline import Pipeline
from lightning_lm.curation.step import CorpusStep, PartitionedStep
from lightning_lm.errors import ConfigurationError

__all__ = ["CurationStage", "Steps", "build_executors", "curation_stages"]


class Steps(PipelineStep):  # type: ignore[misc]
    """Steps that look at one document at a time, as a step of a datatrove pipeline.

    Args:
        steps: The steps.

    Raises:
        ConfigurationError: If one of them needs the whole corpus.
    """

    name = "lightning-lm steps"
    type = "FILTER"

    def __init__(self, *steps: Any) -> None:
        super().__init__()
        self._pipeline = Pipeline(steps)
        for name, step in zip(self._pipeline.names, self._pipeline.steps, strict=True):
            if isinstance(step, CorpusStep):
                raise ConfigurationError(f"{name} needs the whole corpus; run it with build_executors(...).")

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:  # noqa: ARG002
        """Yield the documents that pass.

        Args:
            data: Documents of datatrove.
            rank: Index of the task.
            world_size: Number of tasks.
        """
        chain = Chain(self._pipeline.steps, self._pipeline.names)
        for item in data:
            metadata = dict(item.metadata)
            url = metadata.pop("url", None)
            outcome, _ = chain(Document(document_id(item.text, url, metadata), item.text, url, metadata))
            if not isinstance(outcome, Removed):
                urls = {} if outcome.url is None else {"url": outcome.url}
                yield DatatroveDocument(text=outcome.text, id=item.id, metadata={**outcome.metadata, **urls})


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run whose tasks find each other's results in a shared folder."""

    pipeline: Pipeline
    source: Any
    output: Path
    shard_bytes: int

    @property
    def job(self) -> Job:
        work = self.output.with_name(f"{self.output.name}.partial")
        return Job(
            self.pipeline.steps, self.pipeline.names, self.pipeline.reading, work, 1, self.shard_bytes, Show(False)
        )

    def units(self) -> list[Unit]:
        return list(units_of(self.source, self.pipeline.reading, [self.output, self.job.work]))

    def unit_results(self) -> list[TaskResult]:
        task = self.job.read_task()
        return [result_of(task.folder(unit)) for unit in self.units()]

    def task(self, number: int) -> ShardTask:
        """Return the task of a stage, whose predecessors have finished."""
        job = self.job
        task = job.first_task(self.unit_results())
        for index in range(1, number + 1):
            task = job.next_task(task, index, self.results(task), job.decision_path(task))
        return task

    def results(self, task: ShardTask) -> list[TaskResult]:
        return [result_of(task.folder(index)) for index in range(task.count)]

    def partial_path(self, task: ShardTask, index: int) -> Path:
        return self.job.decision_path(task).with_suffix(f".{index}.npz")


class CurationStage(PipelineStep):  # type: ignore[misc]
    """One stage of a run; a task does each world-size-th piece of it, from its rank on.

    Args:
        title: Name of the stage.
        work: Does the pieces of a task, given its rank and the number of tasks.
    """

    type = "CURATION"

    def __init__(self, title: str, work: Callable[[int, int], None]) -> None:
        super().__init__()
        self.name = title
        self._work = work

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:  # noqa: ARG002
        """Do the pieces of a task; the result is on disk, so nothing is passed on.

        Args:
            data: Not used.
            rank: Index of the task.
            world_size: Number of tasks.
        """
        self._work(rank, world_size)
        yield from ()


def curation_stages(
    pipeline: Pipeline, source: Any, output: Path | str, *, shard_bytes: int = 32_000_000
) -> list[CurationStage]:
    """Return the stages of a run, each to be run by an executor of its own after the one before has finished.

    Args:
        pipeline: The pipeline.
        source: Path or paths on a file system that all machines share.
        output: Folder of the output, on that file system.
        shard_bytes: Text of a shard, bytes.
    """
    run = _Run(pipeline, source, Path(output), shard_bytes)
    stages = [CurationStage("read", _Read(run)), CurationStage("sort", _Shards(run, 0))]
    for number, index in enumerate(run.job.corpus_steps, start=1):
        name, step = pipeline.names[index], pipeline.steps[index]
        if isinstance(step, PartitionedStep):
            stages.append(CurationStage(f"{name} parts", _Partials(run, number, step)))
        stages.append(CurationStage(f"{name} decides", _Decide(run, number, step)))
        stages.append(CurationStage(name, _Shards(run, number)))
    return [*stages, CurationStage("output", _Output(run))]


def build_executors(
    stages: Sequence[CurationStage],
    make: Callable[..., Any],
    *,
    tasks: int,
    logging_dir: Path | str,
    **settings: Any,
) -> Any:
    """Return the executor of the last stage, which runs those it depends on first.

    Args:
        stages: Stages of `curation_stages`.
        make: Class of the executors: ``LocalPipelineExecutor``, ``SlurmPipelineExecutor`` or ``RayPipelineExecutor``.
        tasks: Tasks of a stage; decisions and the output are one task.
        logging_dir: Folder of the executors' logs.
        **settings: Settings of every executor, such as ``workers`` or ``partition``.
    """
    before = None
    for number, stage in enumerate(stages):
        count = 1 if isinstance(stage._work, _Decide | _Output) else tasks
        log = str(Path(logging_dir) / f"{number}-{stage.name.replace(' ', '-')}")
        before = make(pipeline=[stage], tasks=count, logging_dir=log, depends=before, **settings)
    return before


@dataclasses.dataclass(frozen=True)
class _Read:
    run: _Run

    def __call__(self, rank: int, world_size: int) -> None:
        task = self.run.job.read_task()
        for unit in self.run.units()[rank::world_size]:
            task(unit)


@dataclasses.dataclass(frozen=True)
class _Shards:
    run: _Run
    number: int

    def __call__(self, rank: int, world_size: int) -> None:
        task = self.run.task(self.number)
        for index in range(rank, task.count, world_size):
            task(index)


@dataclasses.dataclass(frozen=True)
class _Partials:
    run: _Run
    number: int
    step: PartitionedStep

    def __call__(self, rank: int, world_size: int) -> None:
        task = self.run.task(self.number - 1)
        summaries = summaries_of(self.run.results(task))
        for index in range(rank, self.step.partitions, world_size):
            path = self.run.partial_path(task, index)
            if not path.exists():
                write_arrays(path, self.step.partial(summaries, index))


@dataclasses.dataclass(frozen=True)
class _Decide:
    run: _Run
    number: int
    step: CorpusStep

    def __call__(self, rank: int, world_size: int) -> None:  # noqa: ARG002
        task = self.run.task(self.number - 1)
        path = self.run.job.decision_path(task)
        if path.exists():
            return
        if isinstance(self.step, PartitionedStep):
            paths = [self.run.partial_path(task, index) for index in range(self.step.partitions)]
            write_arrays(path, self.step.merge([load_arrays(found) for found in paths]))
        else:
            write_arrays(path, self.step.decide(summaries_of(self.run.results(task))))


@dataclasses.dataclass(frozen=True)
class _Output:
    run: _Run

    def __call__(self, rank: int, world_size: int) -> None:  # noqa: ARG002
        run, job = self.run, self.run.job
        units = run.units()
        outcome = job.finish(run.unit_results())
        digest = run.pipeline.digest([unit.key for unit in units], run.shard_bytes)
        write_output(run.output, job.work, digest, run.pipeline.steps, outcome)
        shutil.rmtree(job.work, ignore_errors=True)

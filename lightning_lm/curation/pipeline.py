"""The pipeline: steps in their order, run over a corpus on one machine.

The output is a folder of JSON lines that training reads, with a report beside them. It is the same byte for byte
whatever the number of processes, the order of the input and the interruptions on the way.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_lm.curation.document import Document, Removed, as_documents
from lightning_lm.curation.execution.fingerprint import fingerprint_of
from lightning_lm.curation.execution.job import Job
from lightning_lm.curation.execution.output import digest_of, find_output, write_output
from lightning_lm.curation.execution.progress import Show
from lightning_lm.curation.execution.units import Unit, units_of
from lightning_lm.curation.reading.reader import Reading
from lightning_lm.curation.report.report import Report
from lightning_lm.curation.step import CorpusStep, apply_corpus_step
from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Limit, check_numbers
from lightning_lm.storage import discard, held, naming
from lightning_lm.tokenizers.word_counts import num_cores

__all__ = ["Pipeline"]


class Pipeline:
    """Steps from raw documents to clean ones.

    Args:
        steps: Steps in their order: parts of this package, or functions ``(Document) -> Document | Removed``.
        reading: Settings of the readers that make documents of files.

    Raises:
        ConfigurationError: If one of the steps cannot be called and is no corpus step.

    Example:
        >>> from lightning_lm.curation import Document, Pipeline, Removed
        >>> def long(document: Document) -> Document | Removed:
        ...     return document if len(document.text) > 10 else Removed(document, "short", len(document.text), 10)
        >>> [type(outcome).__name__ for outcome in Pipeline([long]).outcomes(["A long text.", "Short."])]
        ['Document', 'Removed']
    """

    def __init__(self, steps: Sequence[Any] = (), reading: Reading = Reading()) -> None:
        self.steps = list(steps)
        self.reading = reading
        for step in self.steps:
            if not isinstance(step, CorpusStep) and (isinstance(step, type) or not callable(step)):
                advice = f"; write {step.__name__}()" if isinstance(step, type) else ""
                raise ConfigurationError(f"{step!r} is no step: a step is called with a document{advice}.")

    @property
    def names(self) -> list[str]:
        """Names of the steps in the report: their classes, numbered where one occurs again."""
        seen: Counter[str] = Counter()
        names = []
        for step in self.steps:
            name = getattr(step, "__name__", None) or type(step).__name__
            seen[name] += 1
            names.append(name if seen[name] == 1 else f"{name} {seen[name]}")
        return names

    def run(
        self,
        source: Any,
        output: Path | str,
        *,
        num_workers: int | None = None,
        shard_bytes: int = 32_000_000,
        show_progress: bool = True,
        overwrite: bool = False,
    ) -> Report:
        """Write the documents that pass all steps into a folder, or open the report if they are there already.

        Args:
            source: A path or several, a `lightning_lm.data.Source`, or an iterable of documents, texts or records.
            output: Folder of the output.
            num_workers: Processes; by default one per core.
            shard_bytes: Text of a file of the output before the steps that need the whole corpus, bytes.
            show_progress: Draw progress bars on standard error.
            overwrite: Replace an output that was made of another input or by other steps.

        Raises:
            ConfigurationError: If the output is of something else, or another process is writing it.
            DataError: If the input has no documents.
        """
        check_numbers({"shard_bytes": Limit.COUNT, "num_workers": Limit.COUNT}, locals())
        output = Path(output)
        work = output.with_name(f"{output.name}.partial")
        with held(work, "choose another output"):
            units = units_of(source, self.reading, [output, work])
            digest = self.digest(units, shard_bytes) if isinstance(units, list) else None
            report = find_output(output, digest, overwrite=overwrite)
            if report is None:
                for leftover in work.glob(".*.tmp"):
                    discard(leftover)
                job = Job(
                    steps=self.steps,
                    names=self.names,
                    reading=self.reading,
                    work=work,
                    num_workers=num_workers or num_cores(),
                    shard_bytes=shard_bytes,
                    show=Show(show_progress),
                )
                with naming(work):
                    report = self._run(job, units, digest, output, overwrite)
            shutil.rmtree(work, ignore_errors=True)
        return report

    def _run(self, job: Job, units: Iterable[Unit], digest: str | None, output: Path, overwrite: bool) -> Report:
        results, keys = job.read(units)
        if digest is None:
            digest = self.digest(keys, job.shard_bytes)
            report = find_output(output, digest, overwrite=overwrite)
            if report is not None:
                return report
        return write_output(output, job.work, digest, self.steps, job.finish(results))

    def digest(self, units: Iterable[Unit | str], shard_bytes: int) -> str:
        """Return the digest of an output: of the input, the steps and the size of its shards.

        Args:
            units: Units of the input, or their keys.
            shard_bytes: Text of a shard, bytes.
        """
        keys = sorted(unit if isinstance(unit, str) else unit.key for unit in units)
        return digest_of(fingerprint_of([self.reading, self.steps, shard_bytes, keys]))

    def outcomes(self, documents: Iterable[Document | str]) -> list[Document | Removed]:
        """Return the outcome of each document in memory, in their order.

        Args:
            documents: Documents with distinct ids, or texts.
        """
        outcomes: list[Document | Removed] = list(as_documents(documents))
        for step in self.steps:
            live = [(index, item) for index, item in enumerate(outcomes) if isinstance(item, Document)]
            if isinstance(step, CorpusStep):
                results: Iterable[Document | Removed] = apply_corpus_step(step, [item for _, item in live])
            else:
                results = (step(item) for _, item in live)
            for (index, _), result in zip(live, results, strict=True):
                outcomes[index] = result
        return outcomes

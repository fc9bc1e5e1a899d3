"""Steps of a pipeline: functions of one document, filters by measured quantities, and steps that need the whole corpus.

Any callable ``(Document) -> Document | Removed`` is a step. The classes here add what such a function cannot express:
`Filter` measures once for the decision and for the histograms of the report, and `CorpusStep` decides about documents
in the light of all others, in two passes: a summary of every shard in the workers, one decision, then one document at a
time again.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from numpy.typing import NDArray

from lightning_lm.curation.document import Document, Removed
from lightning_lm.parts import Part

__all__ = ["Arrays", "Bounds", "CorpusStep", "Filter", "PartitionedStep", "Step", "apply_corpus_step", "check_bounds"]

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
"""Named arrays: the summary of a shard, or a decision. They are stored as ``.npz``, without pickle."""
Step: TypeAlias = Callable[[Document], Document | Removed]
"""A step that looks at one document at a time."""


class Bounds(NamedTuple):
    """Range in which a measured quantity must lie, both ends included; ``None`` for no bound."""

    minimum: float | None = None
    maximum: float | None = None


def check_bounds(document: Document, measures: Mapping[str, float], bounds: Mapping[str, Bounds]) -> Document | Removed:
    """Return the document, or its removal by the first quantity that is out of its bounds.

    Args:
        document: The document.
        measures: Measured quantities by name.
        bounds: Bounds by the same names; a quantity without bounds is only reported.
    """
    for name, (minimum, maximum) in bounds.items():
        value = measures.get(name)
        if value is None:
            continue
        if minimum is not None and not value >= minimum:
            return Removed(document, name, value, minimum)
        if maximum is not None and not value <= maximum:
            return Removed(document, name, value, maximum)
    return document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(Part):
    """Base of steps that keep a document if every measured quantity lies within its bounds."""

    def measures(self, document: Document) -> Mapping[str, float]:
        """Return the quantities that are measured, by the name of the rule.

        Args:
            document: The document.
        """
        raise NotImplementedError

    def bounds(self) -> Mapping[str, Bounds]:
        """Return the bounds of the quantities, in the order in which they are checked."""
        raise NotImplementedError

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document, or its removal by the first rule that it breaks.

        Args:
            document: The document.
        """
        return check_bounds(document, self.measures(document), self.bounds())


@runtime_checkable
class CorpusStep(Protocol):
    """A step that needs the whole corpus before it can decide about one document, such as deduplication.

    A shard is a list of documents with distinct ids, sorted by id; which documents share a shard must not matter.
    """

    def summarize(self, documents: Sequence[Document]) -> Arrays:
        """Return the summary of one shard, computed in a worker.

        Args:
            documents: Documents of the shard.
        """
        ...

    def decide(self, summaries: Sequence[Arrays]) -> Arrays:
        """Return the decision about the corpus; it must not depend on the order of the shards.

        Args:
            summaries: Summaries of all shards. An array is read from disk each time it is looked up, so look up what is
                needed and keep no more of it than is needed.
        """
        ...

    def apply(self, document: Document, decision: Arrays) -> Document | Removed:
        """Return the document, changed or not, or its removal.

        Args:
            document: One of the documents that were summarized, unchanged.
            decision: Result of `decide`; the same object for all documents of a shard.
        """
        ...


@runtime_checkable
class PartitionedStep(CorpusStep, Protocol):
    """A corpus step whose decision is made in parts, so that no process has all summaries in memory.

    ``decide(summaries)`` must equal ``merge([partial(summaries, k) for k in range(partitions)])``.
    """

    partitions: int

    def partial(self, summaries: Sequence[Arrays], partition: int) -> Arrays:
        """Return one part of the decision, computed in a worker, such as the verified pairs of one band.

        Args:
            summaries: Summaries of all shards, as for `decide`.
            partition: Index of the part.
        """
        ...

    def merge(self, partials: Sequence[Arrays]) -> Arrays:
        """Return the decision made of its parts.

        Args:
            partials: Results of `partial`, in the order of their index.
        """
        ...


def apply_corpus_step(step: CorpusStep, documents: Iterable[Document]) -> list[Document | Removed]:
    """Return the outcome of a corpus step for documents in memory, in their order.

    Args:
        step: The step.
        documents: The whole corpus, with distinct ids.
    """
    corpus = list(documents)
    shard = sorted(corpus, key=lambda document: document.id)
    decision = step.decide([step.summarize(shard)])
    return [step.apply(document, decision) for document in corpus]

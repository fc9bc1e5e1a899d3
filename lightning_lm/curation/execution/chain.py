"""Documents through steps, with a tally of each step."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.execution.statistics import Tally, utf8_length
from lightning_lm.curation.step import Arrays, Filter, check_bounds
from lightning_lm.errors import ConfigurationError

__all__ = ["Chain"]


class Chain:
    """Steps that follow each other, of which the first may be a corpus step that has decided.

    Args:
        steps: The steps.
        names: Their names in the report.
        decision: Decision of the first step, if that is a corpus step.
    """

    def __init__(self, steps: Sequence[Any], names: Sequence[str], decision: Arrays | None = None) -> None:
        self.tallies = [Tally() for _ in steps]
        self._names = list(names)
        self._calls = [_Call(step, decision if index == 0 else None) for index, step in enumerate(steps)]

    def __call__(self, document: Document) -> tuple[Document | Removed, str]:
        """Return a document after all steps, or its removal, and the name of the last step that saw it.

        Args:
            document: The document.
        """
        num_bytes, name = utf8_length(document.text), ""
        for name, call, tally in zip(self._names, self._calls, self.tallies, strict=True):
            with _Naming(name, document):
                outcome, measures = call(document)
            if not isinstance(outcome, Document | Removed):
                raise ConfigurationError(
                    f"The step {name} returned {type(outcome).__name__} for the document {document.id}; a step returns "
                    "a Document, or Removed(document, rule)."
                )
            num_bytes = tally.add(document, num_bytes, outcome, measures)
            if isinstance(outcome, Removed):
                return outcome, name
            for count in call.counts:
                found = outcome.metadata.get(count, 0)
                tally.counts.update(found if isinstance(found, Mapping) else {count: int(found)})
            document = outcome
        return document, name


class _Call:
    """One step as a function that also returns the quantities it measured."""

    def __init__(self, step: Any, decision: Arrays | None) -> None:
        self.counts: Sequence[str] = getattr(step, "counts", ())
        self._step, self._decision = step, decision
        self._measures_once = isinstance(step, Filter) and type(step).__call__ is Filter.__call__
        self._bounds = step.bounds() if isinstance(step, Filter) else {}
        self._measures = getattr(step, "measures", None)

    def __call__(self, document: Document) -> tuple[Document | Removed, Mapping[str, float] | None]:
        if self._decision is not None:
            return self._step.apply(document, self._decision), None
        if self._measures_once:
            measures = self._step.measures(document)
            return check_bounds(document, measures, self._bounds), measures
        if self._measures is None or not document.id.startswith("0"):
            return self._step(document), None
        return self._step(document), self._measures(document)


class _Naming:
    """Adds the step and the document to an error that a step raises."""

    def __init__(self, step: str, document: Document) -> None:
        self._step, self._document = step, document

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            origin = self._document.url or "without url"
            error.add_note(f"This happened in the step {self._step}, at the document {self._document.id} ({origin}).")

"""Counts, samples and measured values of each step, the same however the corpus was divided among workers.

Samples are the documents with the smallest ids: ids are digests, so this is a random sample, and the sample of a corpus
is found from those of its shards.
"""

import bisect
import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_lm.curation.document import Document, Removed

__all__ = ["NUM_SAMPLES", "NUM_VALUES", "Smallest", "Tally"]

NUM_SAMPLES = 10
"""Documents shown for a rule."""
NUM_VALUES = 1000
"""Documents whose measured values are kept for histograms."""
_SHOWN = 2000


class Smallest:
    """The items with the smallest keys.

    Args:
        size: Number of items kept.
        items: Items to begin with, as pairs of key and value.
    """

    def __init__(self, size: int, items: Iterable[tuple[str, Any]] = ()) -> None:
        self._size = size
        self._keys: list[str] = []
        self._values: list[Any] = []
        for key, value in items:
            if self.admits(key):
                self.add(key, value)

    def admits(self, key: str) -> bool:
        """Return whether an item with this key would be kept.

        Args:
            key: Key of the item.
        """
        return len(self._keys) < self._size or key < self._keys[-1]

    def add(self, key: str, value: Any) -> None:
        """Add an item and forget the largest if there are too many.

        Args:
            key: Key of the item.
            value: The item.
        """
        place = bisect.bisect(self._keys, key)
        self._keys.insert(place, key)
        self._values.insert(place, value)
        del self._keys[self._size :], self._values[self._size :]

    def items(self) -> list[tuple[str, Any]]:
        """Return the items with their keys, the smallest first."""
        return list(zip(self._keys, self._values, strict=True))


@dataclasses.dataclass
class Tally:
    """Counts and samples of one step.

    Args:
        documents_in: Documents that came.
        documents_out: Documents that were kept.
        bytes_in: Their text, UTF-8 bytes.
        bytes_out: Text that was kept.
        changed: Kept documents whose text changed.
        reasons: Removed documents by rule.
        reason_bytes: Their text by rule, bytes.
        counts: Sums of the numbers that the step reports, such as masks by kind.
        values: Measured quantities of a sample of documents.
        removed: Samples of removed documents by rule.
        kept: A sample of kept documents.
    """

    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    changed: int = 0
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    reason_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    values: Smallest = dataclasses.field(default_factory=lambda: Smallest(NUM_VALUES))
    removed: dict[str, Smallest] = dataclasses.field(default_factory=dict)
    kept: Smallest = dataclasses.field(default_factory=lambda: Smallest(NUM_SAMPLES))

    def add(
        self, before: Document, num_bytes: int, outcome: Document | Removed, measures: Mapping[str, float] | None
    ) -> int:
        """Count a document that passed the step or was removed; return the bytes of its text afterwards.

        Args:
            before: The document as it came.
            num_bytes: Bytes of its text.
            outcome: Result of the step.
            measures: Measured quantities, if the step measures any.
        """
        self.documents_in += 1
        self.bytes_in += num_bytes
        if measures is not None and self.values.admits(before.id):
            self.values.add(before.id, dict(measures))
        if isinstance(outcome, Removed):
            self._add_removed(outcome, num_bytes)
            return 0
        if outcome.text is not before.text and outcome.text != before.text:
            self.changed += 1
            num_bytes = utf8_length(outcome.text)
        self.documents_out += 1
        self.bytes_out += num_bytes
        if self.kept.admits(outcome.id):
            self.kept.add(outcome.id, shown(outcome) | {"measures": dict(measures or {})})
        return num_bytes

    def _add_removed(self, outcome: Removed, num_bytes: int) -> None:
        self.reasons[outcome.rule] += 1
        self.reason_bytes[outcome.rule] += num_bytes
        samples = self.removed.setdefault(outcome.rule, Smallest(NUM_SAMPLES))
        if samples.admits(outcome.document.id):
            detail = {"value": outcome.value, "limit": outcome.limit, "duplicate_of": outcome.duplicate_of}
            samples.add(outcome.document.id, shown(outcome.document) | detail)

    def merge(self, other: "Tally") -> None:
        """Add the counts and samples of another shard.

        Args:
            other: Tally of the same step.
        """
        for name in ("documents_in", "documents_out", "bytes_in", "bytes_out", "changed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasons += other.reasons
        self.reason_bytes += other.reason_bytes
        self.counts += other.counts
        _take(self.values, other.values)
        _take(self.kept, other.kept)
        for rule, samples in other.removed.items():
            _take(self.removed.setdefault(rule, Smallest(NUM_SAMPLES)), samples)

    def to_dict(self) -> dict[str, Any]:
        """Return the tally as plain data."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain |= {name: dict(plain[name]) for name in ("reasons", "reason_bytes", "counts")}
        plain |= {"values": self.values.items(), "kept": self.kept.items()}
        return plain | {"removed": {rule: samples.items() for rule, samples in self.removed.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Tally":
        """Return the tally that `to_dict` described.

        Args:
            data: Plain data.
        """
        counters = {name: Counter(data[name]) for name in ("reasons", "reason_bytes", "counts")}
        samples: dict[str, Any] = {
            "values": Smallest(NUM_VALUES, data["values"]),
            "kept": Smallest(NUM_SAMPLES, data["kept"]),
            "removed": {rule: Smallest(NUM_SAMPLES, items) for rule, items in data["removed"].items()},
        }
        return cls(**{**data, **counters, **samples})


def _take(into: Smallest, samples: Smallest) -> None:
    for key, value in samples.items():
        if not into.admits(key):
            return
        into.add(key, value)


def utf8_length(text: str) -> int:
    """Return the bytes of a text in UTF-8; a lone surrogate counts as three.

    Args:
        text: The text.
    """
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def shown(document: Document) -> dict[str, Any]:
    """Return the beginning of a document for a report.

    Args:
        document: The document.
    """
    return {"url": document.url, "text": document.text[:_SHOWN], "length": len(document.text)}

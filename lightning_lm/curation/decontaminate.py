"""Documents that contain text of an evaluation set, found by shared word n-grams (Brown et al. 2020, appendix C).

An item of fewer words than an n-gram is looked for as a whole if it has `min_words`; shorter ones are everyday phrases.
"""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.shingles import ngram_hashes, word_hashes
from lightning_lm.data import Source, as_source
from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Limit, Part

__all__ = ["Contamination", "Decontaminate", "EvaluationIndex"]

_SHOWN = 80


@dataclasses.dataclass(frozen=True, slots=True)
class Contamination:
    """Overlap of a document with the item of an evaluation set of which it has most.

    Args:
        item: Index of the item in the set.
        text: Beginning of the item.
        overlap: Fraction of the item's n-grams that the document contains.
    """

    item: int
    text: str
    overlap: float


class EvaluationIndex:
    """Word n-grams of the items of an evaluation set.

    Args:
        items: Texts of the set.
        ngram: Words of an n-gram.
        min_words: Fewest words of an item that is looked for.

    Attributes:
        num_items: Items of the set.
        num_skipped: Items that have too few words to be looked for.
        skipped: Their indices.

    Example:
        >>> index = EvaluationIndex(["What is the sum of the first hundred odd natural numbers?"], ngram=5)
        >>> index.find("He asked: what is the sum of the first ten numbers?").overlap
        0.42857142857142855
    """

    def __init__(self, items: Iterable[str], *, ngram: int = 13, min_words: int = 8) -> None:
        self.skipped: list[int] = []
        self._texts: list[str] = []
        self._sizes: list[int] = []
        by_length: dict[int, list[tuple[NDArray[np.uint64], int]]] = {}
        for number, text in enumerate(items):
            words = word_hashes(text)
            self._texts.append(" ".join(text.split())[:_SHOWN])
            self._sizes.append(0)
            if len(words) < min(min_words, ngram):
                self.skipped.append(number)
                continue
            ngrams = np.unique(ngram_hashes(words, ngram))
            self._sizes[-1] = len(ngrams)
            by_length.setdefault(min(ngram, len(words)), []).append((ngrams, number))
        self.num_items, self.num_skipped = len(self._texts), len(self.skipped)
        self._tables = {length: _table(rows) for length, rows in by_length.items()}

    def find(self, text: str) -> Contamination | None:
        """Return the item of which a text contains the largest fraction, or None if there is none.

        Args:
            text: Text of a document.
        """
        overlaps = self.overlaps(text)
        if not overlaps:
            return None
        item = max(overlaps, key=lambda number: overlaps[number])
        return Contamination(item, self._texts[item], overlaps[item])

    def overlaps(self, text: str) -> dict[int, float]:
        """Return the fraction of each item's n-grams that a text contains, by the index of the item.

        Args:
            text: Text of a document.
        """
        words = word_hashes(text)
        found: dict[int, float] = {}
        for length, (hashes, items) in self._tables.items():
            if len(words) < length:
                continue
            ngrams = np.unique(ngram_hashes(words, length))
            begins = np.searchsorted(hashes, ngrams)
            ends = np.searchsorted(hashes, ngrams, side="right")
            hits = [items[begin:end] for begin, end in zip(begins[begins < ends], ends[begins < ends], strict=True)]
            if hits:
                numbers, counts = np.unique(np.concatenate(hits), return_counts=True)
                shares = counts / np.array(self._sizes)[numbers]
                found |= dict(zip(numbers.tolist(), shares.tolist(), strict=True))
        return found


def _table(rows: list[tuple[NDArray[np.uint64], int]]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the sorted hashes of n-grams, and the item of each."""
    hashes = np.concatenate([ngrams for ngrams, _ in rows])
    items = np.repeat([number for _, number in rows], [len(ngrams) for ngrams, _ in rows])
    order = np.argsort(hashes, kind="stable")
    return hashes[order], items[order]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decontaminate(Part, limits={"ngram": Limit.COUNT, "min_words": Limit.COUNT, "max_overlap": Limit.BELOW_ONE}):
    """Removes documents that contain text of an evaluation set; the removal names the item that was hit.

    Args:
        evaluation: The evaluation set: a `Source` of its texts, or the path of a file or folder.
        ngram: Words of an n-gram.
        min_words: Fewest words of an item that is looked for.
        max_overlap: Largest fraction of an item's n-grams that a document may contain; 0 removes on the first one.

    Raises:
        ConfigurationError: If no item has enough words.
    """

    evaluation: Source | str = dataclasses.field(kw_only=False)
    ngram: int = 13
    min_words: int = 8
    max_overlap: float = 0.0

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document, or its removal with the overlap and the item that was hit.

        Args:
            document: The document.
        """
        found = self.index.find(document.text)
        if found is None or found.overlap <= self.max_overlap:
            return document
        return Removed(document, "contaminated", round(found.overlap, 4), f"item {found.item}: {found.text}")

    @functools.cached_property
    def index(self) -> EvaluationIndex:
        """The n-grams of the evaluation set, read at first use."""
        index = EvaluationIndex(as_source(self.evaluation).documents(), ngram=self.ngram, min_words=self.min_words)
        if not index.num_items > index.num_skipped:
            raise ConfigurationError(
                f"None of the {index.num_items} items of {self.evaluation!r} has {self.min_words} words, so nothing "
                "can be found. Lower min_words, or name the field with the text: Files(path, field='question')."
            )
        return index

"""Documents with exactly the same text: one of each is kept."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.decisions import ids_of, removal
from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.hashing import hash_texts
from lightning_lm.curation.keep import KeepLongest, KeepRule
from lightning_lm.curation.step import Arrays
from lightning_lm.parts import Part

__all__ = ["ExactDuplicates"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactDuplicates(Part):
    """Removes all but one of the documents with the same text, compared by a 64-bit hash and the length.

    Args:
        keep: Rule for the copy that is kept; by default that with the smallest id, since all are equally long.

    Example:
        >>> from lightning_lm.curation import ExactDuplicates, apply_corpus_step, as_document
        >>> documents = [as_document(text, url) for text, url in (("a", "x"), ("b", "y"), ("a", "z"))]
        >>> sum(result in documents for result in apply_corpus_step(ExactDuplicates(), documents))
        2
    """

    keep: KeepRule = KeepLongest()

    def summarize(self, documents: Sequence[Document]) -> Arrays:
        """Return ids, hashes, lengths and priorities.

        Args:
            documents: Documents of a shard.
        """
        return {
            "ids": ids_of(documents),
            "hashes": hash_texts([document.text for document in documents]),
            "lengths": np.array([len(document.text) for document in documents], np.int64),
            "priorities": np.array([self.keep.priority(document) for document in documents], np.float64),
        }

    def decide(self, summaries: Sequence[Arrays]) -> Arrays:
        """Return the documents to remove, each with the copy that is kept.

        Args:
            summaries: Summaries of all shards.
        """
        columns: dict[str, NDArray[Any]] = {
            name: np.concatenate([summary[name] for summary in summaries] or [np.zeros(0, kind)])
            for name, kind in (("ids", "S1"), ("hashes", "u8"), ("lengths", "i8"), ("priorities", "f8"))
        }
        ids, hashes, lengths = columns["ids"], columns["hashes"], columns["lengths"]
        order = np.lexsort((ids, -columns["priorities"], lengths, hashes))  # copies together, the best of them first
        hashes, lengths = hashes[order], lengths[order]
        repeats = np.flatnonzero((hashes[1:] == hashes[:-1]) & (lengths[1:] == lengths[:-1])) + 1
        is_first = np.ones(len(order), bool)
        is_first[repeats] = False
        first = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
        removed, kept = ids[order[repeats]], ids[order[first[repeats]]]
        by_id = np.argsort(removed)
        return {"removed": removed[by_id], "kept": kept[by_id]}

    def apply(self, document: Document, decision: Arrays) -> Document | Removed:
        """Return the document, or its removal with the id of the copy that is kept.

        Args:
            document: One of the documents that were summarized.
            decision: Result of `decide`.
        """
        return removal(document, "exact_duplicate", decision) or document

"""Ids in arrays, decisions that list documents by them, and random numbers that follow from them."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.hashing import hash_texts
from lightning_lm.curation.step import Arrays

__all__ = ["ids_of", "removal", "uniform_of_ids"]


def ids_of(documents: Sequence[Document]) -> NDArray[np.bytes_]:
    """Return the ids of documents as an array, bytes [documents].

    Args:
        documents: The documents.
    """
    return np.array([document.id.encode() for document in documents], np.bytes_)


def removal(document: Document, rule: str, decision: Arrays) -> Removed | None:
    """Return the removal of a document, or None if the decision does not list it.

    Args:
        document: The document.
        rule: Name of the rule.
        decision: ``removed``, sorted ids, and ``kept``, the id of the document that stays for each.
    """
    removed, key = decision["removed"], document.id.encode()
    place = int(np.searchsorted(removed, key))
    if place == len(removed) or removed[place] != key:
        return None
    return Removed(document, rule, duplicate_of=decision["kept"][place].decode())


def uniform_of_ids(ids: Iterable[str], seed: int) -> NDArray[np.float64]:
    """Return numbers in [0, 1), float64 [ids], that depend on id and seed alone, not on the order of documents.

    Args:
        ids: Ids of documents.
        seed: Seed.
    """
    hashes = hash_texts(f"{seed}:{name}" for name in ids)
    return (hashes >> np.uint64(11)).astype(np.float64) / (1 << 53)

"""Decisions that list the documents to remove, sorted by id, each with the one that is kept instead."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.step import Arrays

__all__ = ["ids_of", "removal"]


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

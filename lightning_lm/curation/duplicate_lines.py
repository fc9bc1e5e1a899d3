"""Lines that repeat across documents, such as menus and notices: all copies are removed, or all but the first.

Lines are compared by 64-bit hashes without the spaces at their ends.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.decisions import ids_of
from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.hashing import hash_bytes
from lightning_lm.curation.step import Arrays
from lightning_lm.parts import Limit, Part

__all__ = ["DuplicateLines"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicateLines(Part, limits={"max_copies": Limit.COUNT, "min_characters": Limit.COUNT}):
    r"""Takes lines that repeat in a corpus out of its documents, and removes documents of which no line remains.

    Args:
        keep: ``none`` of the copies, or the ``first`` in the order of document ids.
        max_copies: Most copies of a line that is no repetition, in one document or in many.
        min_characters: Length of the shortest line that is compared; blank lines never are.

    Example:
        >>> from lightning_lm.curation import DuplicateLines, apply_corpus_step, as_document
        >>> pages = [as_document("Home\nOne text"), as_document("Home\nAnother text")]
        >>> sorted(document.text for document in apply_corpus_step(DuplicateLines(), pages))
        ['Another text', 'One text']
    """

    keep: Literal["none", "first"] = "none"
    max_copies: int = 1
    min_characters: int = 1

    def summarize(self, documents: Sequence[Document]) -> Arrays:
        """Return the different lines with their counts and the first document of each.

        Args:
            documents: Documents of a shard.
        """
        texts = [_lines(document.text) for document in documents]
        hashes, compared = self._hashes(list(itertools.chain.from_iterable(texts)))
        if self.keep == "none":
            distinct, copies = np.unique(hashes[compared], return_counts=True)
            return {"lines": distinct, "copies": copies}
        rows = np.repeat(np.arange(len(documents)), list(map(len, texts)))[compared]
        distinct, first, copies = np.unique(hashes[compared], return_index=True, return_counts=True)
        return {"lines": distinct, "copies": copies, "rows": rows[first], "ids": ids_of(documents)}

    def decide(self, summaries: Sequence[Arrays]) -> Arrays:
        """Return the sorted hashes of the lines that repeat, and the first document of each if it is kept.

        Args:
            summaries: Summaries of all shards.
        """
        lines = np.concatenate([np.zeros(0, np.uint64), *(summary["lines"] for summary in summaries)])
        copies = np.concatenate([np.zeros(0, np.int64), *(summary["copies"] for summary in summaries)])
        order = np.argsort(lines)
        lines, copies = lines[order], copies[order]
        begins = np.flatnonzero(np.append(True, lines[1:] != lines[:-1]))[: len(lines)]
        totals = np.add.reduceat(copies, begins) if len(lines) else copies
        repeated = totals > self.max_copies
        if self.keep == "none":
            return {"lines": lines[begins[repeated]]}
        ids = np.concatenate([np.zeros(0, np.bytes_), *(summary["ids"][summary["rows"]] for summary in summaries)])
        ids, firsts = np.unique(ids, return_inverse=True)
        firsts = np.minimum.reduceat(firsts[order], begins) if len(lines) else firsts
        return {"lines": lines[begins[repeated]], "first": ids[firsts[repeated]]}

    def apply(self, document: Document, decision: Arrays) -> Document | Removed:
        """Return the document without lines that repeat, or its removal if nothing remains.

        Args:
            document: One of the documents that were summarized.
            decision: Result of `decide`.
        """
        lines = document.text.split("\n")
        hashes, compared = self._hashes(_lines(document.text))
        places = np.searchsorted(decision["lines"], hashes)
        places[places == len(decision["lines"])] = 0
        repeated = (decision["lines"][places] == hashes) & compared if len(decision["lines"]) else compared & False
        if self.keep == "first" and repeated.any():
            own = decision["first"][places] == document.id.encode()
            _, first = np.unique(hashes, return_index=True)
            own[np.setdiff1d(np.arange(len(own)), first)] = False
            repeated &= ~own
        if not repeated.any():
            return document
        text = "\n".join(line for line, drop in zip(lines, repeated.tolist(), strict=True) if not drop)
        if not text or text.isspace():
            return Removed(document, "duplicate_lines", int(repeated.sum()))
        return dataclasses.replace(document, text=text)

    def _hashes(self, lines: Sequence[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """Return the hash of each line, and whether it is compared."""
        hashes = hash_bytes(lines)
        compared = hashes != hash_bytes([b""])[0]
        if self.min_characters > 1:
            compared &= np.array([len(line.decode("utf-8", "surrogatepass")) for line in lines]) >= self.min_characters
        return hashes, compared


def _lines(text: str) -> list[bytes]:
    """Return lines without spaces at their ends."""
    return list(map(bytes.strip, text.encode("utf-8", "surrogatepass").split(b"\n")))

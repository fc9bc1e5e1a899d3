"""Lines that repeat across documents, such as menus and notices: all copies are removed, or all but the first.

Lines are compared by 64-bit hashes without the spaces at their ends. A shard is summarized in one pass over the bytes
of all its texts.
"""

import dataclasses
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

_MARKS = (b"\t", b"\r", b"\x0b", b"\x0c")
"""White space other than a space that may stand at the end of a line."""


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
        lines = _lines("\n".join(document.text for document in documents)) if documents else []
        hashes, compared = self._hashes(lines)
        if self.keep == "none":
            distinct, copies = np.unique(hashes[compared], return_counts=True)
            return {"lines": distinct, "copies": copies}
        counts = np.array([document.text.count("\n") + 1 for document in documents], np.int64)
        rows = np.repeat(np.arange(len(documents)), counts)[compared]
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

    def _hashes(self, lines: list[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """Return the hash of each line, and whether it is compared."""
        hashes = hash_bytes(lines)
        compared = hashes != hash_bytes([b""])[0]
        if self.min_characters > 1:
            compared &= np.array([len(line.decode("utf-8", "surrogatepass")) for line in lines]) >= self.min_characters
        return hashes, compared


def _lines(text: str) -> list[bytes]:
    """Return lines without spaces at their ends; few texts have any, which a search in the bytes finds out."""
    data = text.encode("utf-8", "surrogatepass")
    lines = data.split(b"\n")
    codes = np.frombuffer(b"\n" + data + b"\n", np.uint8)
    breaks = np.flatnonzero(codes == ord("\n"))
    has_spaces = (codes[breaks[:-1] + 1] == ord(" ")) | (codes[breaks[1:] - 1] == ord(" "))
    if has_spaces.any() or any(mark in data for mark in _MARKS):
        return list(map(bytes.strip, lines))
    return lines

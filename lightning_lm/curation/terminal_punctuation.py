"""Punctuation that ends a sentence in any script: Unicode's property ``Sentence_Terminal``."""

import functools
import sys

import numpy as np
import regex
from numpy.typing import NDArray

from lightning_lm.curation.words import codes_of

__all__ = ["num_sentences", "terminal_punctuation"]


@functools.cache
def terminal_punctuation() -> frozenset[str]:
    """Return the characters that end a sentence."""
    characters = "".join(map(chr, range(0x20000)))  # those beyond are ideographs, and not assigned
    return frozenset(regex.findall(r"\p{Sentence_Terminal}", characters))


def num_sentences(text: str) -> int:
    """Return the number of ends of sentences: punctuation, closing quotes or brackets, then white space or the end.

    Args:
        text: Text of a document.
    """
    codes = codes_of(f"{text} ")
    ends, spaces, closing, alone = (table[: 256 if codes.dtype == np.uint8 else None] for table in _tables())
    places, found = np.flatnonzero(ends.take(codes)) + 1, int(np.count_nonzero(alone.take(codes)))
    while len(places):
        after = codes.take(places)
        found += int(np.count_nonzero(spaces.take(after)))
        places = places[closing.take(after)] + 1
    return found


_WITHOUT_SPACE = "\u3002\uff01\uff1f"
"""Ideographic full stop, fullwidth exclamation mark and question mark: Chinese and Japanese put no space after them."""
_CLOSING = "\"'\u201d\u2019\u00bb)]"


@functools.cache
def _tables() -> tuple[NDArray[np.bool_], ...]:
    """Return for each code point whether it ends a sentence, is white space, closes a quote, ends one by itself."""
    ends = "".join(terminal_punctuation() - set(_WITHOUT_SPACE)) + "\u2026"
    spaces = "".join(filter(str.isspace, map(chr, range(0x3001))))
    found = []
    for characters in (ends, spaces, _CLOSING, _WITHOUT_SPACE):
        table = np.zeros(sys.maxunicode + 1, bool)
        table[list(map(ord, characters))] = True
        found.append(table)
    return tuple(found)

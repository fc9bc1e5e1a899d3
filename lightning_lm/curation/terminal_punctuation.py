"""Punctuation that ends a sentence in any script: Unicode's property ``Sentence_Terminal``."""

import functools
import re
import sys

import numpy as np
import regex
from numpy.typing import NDArray

__all__ = ["num_sentences", "terminal_punctuation"]


@functools.cache
def terminal_punctuation() -> frozenset[str]:
    """Return the characters that end a sentence."""
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    return frozenset(regex.findall(r"\p{Sentence_Terminal}", characters))


def num_sentences(text: str) -> int:
    """Return the number of ends of sentences: punctuation, closing quotes or brackets, then white space or the end.

    Args:
        text: Text of a document.
    """
    if not text.isascii():
        return len(_end_of_sentence().findall(text))
    codes = np.frombuffer(f"{text} ".encode(), np.uint8)
    places, found = np.flatnonzero(_table(".?!").take(codes)) + 1, 0
    while len(places):
        found += int(np.count_nonzero(_table(" \t\n\r\v\f\x1c\x1d\x1e\x1f").take(codes.take(places))))
        places = places[_table("\"')]").take(codes.take(places))] + 1
    return found


@functools.cache
def _table(characters: str) -> NDArray[np.bool_]:
    """Return for each ASCII character whether it is one of these."""
    return np.isin(np.arange(128), list(map(ord, characters)))


_WITHOUT_SPACE = "\u3002\uff01\uff1f"
"""Ideographic full stop, fullwidth exclamation mark and question mark."""


@functools.cache
def _end_of_sentence() -> re.Pattern[str]:
    """Return the pattern for any script; Chinese and Japanese put no space after a full stop."""
    ends = re.escape("".join(sorted(terminal_punctuation() - set(_WITHOUT_SPACE))))
    return re.compile(rf"[{ends}\u2026][\"'\u201d\u2019\u00bb)\]]*(?=\s|\Z)|[{_WITHOUT_SPACE}]")

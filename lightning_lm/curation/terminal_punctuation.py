"""Punctuation that ends a sentence in any script: Unicode's property ``Sentence_Terminal``."""

import functools
import re
import sys

import regex

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
    return len((_ASCII_END if text.isascii() else _end_of_sentence()).findall(text))


_WITHOUT_SPACE = "\u3002\uff01\uff1f"
"""Ideographic full stop, fullwidth exclamation mark and question mark."""
_ASCII_END = re.compile(r"[.?!][\"')\]]*(?=\s|\Z)")


@functools.cache
def _end_of_sentence() -> re.Pattern[str]:
    """Return the pattern for any script; Chinese and Japanese put no space after a full stop."""
    ends = re.escape("".join(sorted(terminal_punctuation() - set(_WITHOUT_SPACE))))
    return re.compile(rf"[{ends}\u2026][\"'\u201d\u2019\u00bb)\]]*(?=\s|\Z)|[{_WITHOUT_SPACE}]")

"""Lines and paragraphs of a text, and the fractions of them that repeat."""

import functools
import re
from collections.abc import Sequence

__all__ = ["duplicate_fractions", "lines_of", "paragraphs_of"]

_BLANK_LINES = re.compile(r"\n\s*\n")


@functools.lru_cache(maxsize=1)
def lines_of(text: str) -> tuple[str, ...]:
    """Return the lines of a text that are not blank, stripped. The last result is kept for the next rule.

    Args:
        text: Text of a document.
    """
    return tuple(filter(None, map(str.strip, text.splitlines())))


def paragraphs_of(text: str) -> list[str]:
    """Return what stands between blank lines, stripped.

    Args:
        text: Text of a document.
    """
    if "\n\n" not in text and not _BLANK_LINES.search(text):
        return [text.strip()] if text and not text.isspace() else []
    return [paragraph.strip() for paragraph in _BLANK_LINES.split(text.strip()) if paragraph]


def duplicate_fractions(strings: Sequence[str]) -> tuple[float, float]:
    """Return the fractions of strings, and of their characters, that repeat an earlier string.

    Args:
        strings: Lines or paragraphs.

    Example:
        >>> duplicate_fractions(["aa", "b", "aa", "aa"])
        (0.5, 0.5714285714285714)
    """
    unique = set(strings)
    if len(unique) == len(strings):
        return 0.0, 0.0
    total = sum(map(len, strings))
    return 1 - len(unique) / len(strings), (total - sum(map(len, unique))) / total

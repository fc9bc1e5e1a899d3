"""Repetition rules of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1 and table A1).

Fractions are of characters without white space for duplicate n-grams and of the whole text for the most frequent
n-gram, which is counted with its spaces. A word in several overlapping duplicate n-grams counts once, as the paper
asks. An n-gram that occurs once is no repetition, so a short text without any is not removed for its only bigram.
"""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.document import Document
from lightning_lm.curation.lines import duplicate_fractions, lines_of, paragraphs_of
from lightning_lm.curation.step import Bounds, Filter
from lightning_lm.curation.words import Words, combine_ngrams, words_of
from lightning_lm.parts import Limit

__all__ = ["GopherRepetition", "gopher_repetition", "ngram_repetition"]

_TOP = (2, 3, 4)
_DUPLICATE = (5, 6, 7, 8, 9, 10)
_BEYOND = np.random.default_rng(0).integers(0, 1 << 64, _DUPLICATE[-1], np.uint64)
"""Different words after the last one, with which an n-gram that goes beyond the text occurs once."""
_LINE_RULES = tuple(f"duplicate_{name}" for name in ("lines", "line_characters", "paragraphs", "paragraph_characters"))
_NGRAM_RULES = tuple([f"top_{n}_gram" for n in _TOP] + [f"duplicate_{n}_grams" for n in _DUPLICATE])


def gopher_repetition(text: str) -> dict[str, float]:
    """Return the measured quantities of Gopher's repetition rules, each a fraction.

    Args:
        text: Text of a document.
    """
    lines, paragraphs = duplicate_fractions(lines_of(text)), duplicate_fractions(paragraphs_of(text))
    fractions = dict(zip(_LINE_RULES, lines + paragraphs, strict=True))
    return fractions | ngram_repetition(words_of(text), len(text))


def ngram_repetition(words: Words, num_characters: int) -> dict[str, float]:
    """Return the fractions of characters in the most frequent 2- to 4-gram and in duplicate 5- to 10-grams.

    A longer n-gram can occur twice only where its first n - 1 words do, so from one n to the next only those positions
    are looked at. A sort key has an n-gram's hash in its high bits and its position in the low ones.

    Args:
        words: Words of the text.
        num_characters: Length of the text.
    """
    fractions = dict.fromkeys(_NGRAM_RULES, 0.0)
    ends = np.zeros(len(words) + 1, np.int64)
    np.cumsum(words.lengths, out=ends[1:])
    low = np.uint64((1 << len(words).bit_length()) - 1)
    positions, ngrams = np.arange(len(words)), words.hashes
    hashes = np.concatenate((ngrams, _BEYOND))
    for n in range(2, _DUPLICATE[-1] + 1):
        keys = combine_ngrams(ngrams, hashes.take(positions + (n - 1)))
        keys = (keys & ~low) | positions.view(np.uint64)
        keys.sort()
        repeats = (keys[1:] ^ keys[:-1]) <= low
        if not repeats.any():
            break
        positions = (keys & low).view(np.int64)
        if n in _TOP:
            fractions[f"top_{n}_gram"] = _top_characters(positions, repeats, n, ends) / num_characters
        else:
            covered = _characters_covered(np.sort(positions[1:][repeats]), n, ends)
            fractions[f"duplicate_{n}_grams"] = covered / int(ends[-1])
        members = np.zeros(len(keys), bool)
        members[1:] = repeats
        members[:-1] |= repeats
        positions, ngrams = positions[members], keys[members] & ~low
    return fractions


def _top_characters(positions: NDArray[np.int64], repeats: NDArray[np.bool_], n: int, ends: NDArray[np.int64]) -> int:
    """Return characters of all occurrences of the most frequent n-gram, the first of several, with its spaces."""
    begins = np.concatenate(([0], (~repeats).nonzero()[0] + 1, [len(positions)]))
    sizes = begins[1:] - begins[:-1]
    largest = int(sizes.max())
    first = int(positions[begins[:-1][sizes == largest]].min())
    return (int(ends[first + n] - ends[first]) + n - 1) * largest


def _characters_covered(starts: NDArray[np.int64], n: int, ends: NDArray[np.int64]) -> int:
    """Return how many characters lie in the n-grams that begin at sorted positions, each character counted once."""
    stops = starts + n
    begins = starts.copy()
    np.maximum(starts[1:], stops[:-1], out=begins[1:])
    return int((ends[stops] - ends[begins]).sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class GopherRepetition(
    Filter, limits=dict.fromkeys([f"max_{rule}" for rule in _LINE_RULES + _NGRAM_RULES], Limit.FRACTION)
):
    """Keeps documents within the limits of Gopher's repetition rules, all of them fractions; ``None`` turns a rule off.

    Args:
        max_duplicate_lines: Lines that repeat an earlier line.
        max_duplicate_line_characters: Characters in such lines.
        max_duplicate_paragraphs: Paragraphs that repeat an earlier paragraph.
        max_duplicate_paragraph_characters: Characters in such paragraphs.
        max_top_2_gram: Characters in the most frequent 2-gram.
        max_top_3_gram: Characters in the most frequent 3-gram.
        max_top_4_gram: Characters in the most frequent 4-gram.
        max_duplicate_5_grams: Characters in 5-grams that repeat an earlier one.
        max_duplicate_6_grams: Characters in such 6-grams.
        max_duplicate_7_grams: Characters in such 7-grams.
        max_duplicate_8_grams: Characters in such 8-grams.
        max_duplicate_9_grams: Characters in such 9-grams.
        max_duplicate_10_grams: Characters in such 10-grams.
    """

    max_duplicate_lines: float | None = 0.30
    max_duplicate_line_characters: float | None = 0.20
    max_duplicate_paragraphs: float | None = 0.30
    max_duplicate_paragraph_characters: float | None = 0.20
    max_top_2_gram: float | None = 0.20
    max_top_3_gram: float | None = 0.18
    max_top_4_gram: float | None = 0.16
    max_duplicate_5_grams: float | None = 0.15
    max_duplicate_6_grams: float | None = 0.14
    max_duplicate_7_grams: float | None = 0.13
    max_duplicate_8_grams: float | None = 0.12
    max_duplicate_9_grams: float | None = 0.11
    max_duplicate_10_grams: float | None = 0.10

    def measures(self, document: Document) -> Mapping[str, float]:
        """Return the quantities of `gopher_repetition`.

        Args:
            document: The document.
        """
        return gopher_repetition(document.text)

    def bounds(self) -> Mapping[str, Bounds]:
        """Return the limits by the name of the quantity."""
        return self._bounds

    @functools.cached_property
    def _bounds(self) -> dict[str, Bounds]:
        return {rule: Bounds(maximum=getattr(self, f"max_{rule}")) for rule in _LINE_RULES + _NGRAM_RULES}

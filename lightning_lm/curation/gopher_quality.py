"""Document quality rules of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1).

Words are separated by white space and lines are those that are not blank. A word tokenizer, as other implementations
use, would count punctuation as words.
"""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.document import Document
from lightning_lm.curation.lines import lines_of
from lightning_lm.curation.step import Bounds, Filter
from lightning_lm.curation.words import hash_of_word, words_of
from lightning_lm.parts import Limit

__all__ = ["GopherQuality", "gopher_quality"]

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = ("•", "-", "*", "‣", "◦", "▪")
_ELLIPSES = ("...", "…")


def gopher_quality(
    text: str, *, stop_words: tuple[str, ...] = STOP_WORDS, bullets: tuple[str, ...] = BULLETS
) -> dict[str, float]:
    """Return the measured quantities of Gopher's quality rules.

    Args:
        text: Text of a document.
        stop_words: Words of which a text in the language has some; compared as they are written.
        bullets: Characters that begin an item of a list.

    Returns:
        Numbers of words and of different stop words, the mean length of a word in characters, ``#`` and ellipses per
        word, fractions of lines that begin with a bullet or end with an ellipsis, and of words with a letter.
    """
    words, lines = words_of(text), lines_of(text)
    num_words, num_lines = max(len(words), 1), max(len(lines), 1)
    num_ellipses = text.count("...") + text.count("…")
    return {
        "num_words": len(words),
        "mean_word_length": float(words.lengths.sum()) / num_words,
        "hashes_per_word": text.count("#") / num_words,
        "ellipses_per_word": num_ellipses / num_words,
        "bullet_lines": sum(line.startswith(bullets) for line in lines) / num_lines,
        "ellipsis_lines": sum(line.endswith(_ELLIPSES) for line in lines) / num_lines if num_ellipses else 0.0,
        "alphabetic_words": int((words.num_letters > 0).sum()) / num_words,
        "stop_words": int((words.hashes == _hashes(tuple(stop_words))).any(axis=1).sum()),
    }


@functools.lru_cache(maxsize=16)
def _hashes(words: tuple[str, ...]) -> NDArray[np.uint64]:
    """Return the hashes of different words, uint64 [words, 1]."""
    return np.array([hash_of_word(word) for word in words], np.uint64)[:, None]


_LIMITS = {
    **dict.fromkeys(("min_words", "max_words", "min_mean_word_length", "max_mean_word_length"), Limit.NON_NEGATIVE),
    **dict.fromkeys(("max_hashes_per_word", "max_ellipses_per_word", "min_stop_words"), Limit.NON_NEGATIVE),
    **dict.fromkeys(("max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words"), Limit.FRACTION),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GopherQuality(Filter, limits=_LIMITS):
    """Keeps documents within the limits of Gopher's quality rules; ``None`` turns a rule off.

    Args:
        min_words: Fewest words.
        max_words: Most words.
        min_mean_word_length: Shortest mean length of a word, characters.
        max_mean_word_length: Longest mean length of a word, characters.
        max_hashes_per_word: Most ``#`` per word.
        max_ellipses_per_word: Most ellipses per word.
        max_bullet_lines: Largest fraction of lines that begin with a bullet.
        max_ellipsis_lines: Largest fraction of lines that end with an ellipsis.
        min_alphabetic_words: Smallest fraction of words with a letter.
        min_stop_words: Fewest different stop words.
        stop_words: Words that a text in the language has; those of English by default.
        bullets: Characters that begin an item of a list.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0
    max_mean_word_length: float | None = 10.0
    max_hashes_per_word: float | None = 0.1
    max_ellipses_per_word: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: int | None = 2
    stop_words: tuple[str, ...] = STOP_WORDS
    bullets: tuple[str, ...] = BULLETS

    def measures(self, document: Document) -> Mapping[str, float]:
        """Return the quantities of `gopher_quality`.

        Args:
            document: The document.
        """
        return gopher_quality(document.text, stop_words=self.stop_words, bullets=self.bullets)

    def bounds(self) -> Mapping[str, Bounds]:
        """Return the limits by the name of the quantity."""
        return {
            "num_words": Bounds(self.min_words, self.max_words),
            "mean_word_length": Bounds(self.min_mean_word_length, self.max_mean_word_length),
            "hashes_per_word": Bounds(maximum=self.max_hashes_per_word),
            "ellipses_per_word": Bounds(maximum=self.max_ellipses_per_word),
            "bullet_lines": Bounds(maximum=self.max_bullet_lines),
            "ellipsis_lines": Bounds(maximum=self.max_ellipsis_lines),
            "alphabetic_words": Bounds(self.min_alphabetic_words),
            "stop_words": Bounds(self.min_stop_words),
        }

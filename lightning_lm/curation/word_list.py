"""Documents with words of a list, such as those of a user's blocklist for harmful pages."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.document import Document
from lightning_lm.curation.shingles import ngram_hashes, word_hashes
from lightning_lm.curation.step import Bounds, Filter
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.parts import Limit

__all__ = ["WordList", "count_listed"]


def count_listed(text: str, phrases: Iterable[str]) -> int:
    """Return how often words or phrases of a list occur in a text, whole words in any case and punctuation.

    Args:
        text: Text of a document.
        phrases: Words and phrases.

    Example:
        >>> count_listed("Buy NOW! Buy now? Nowhere.", ["buy now", "nowhere"])
        3
    """
    return _count(word_hashes(text), _index(phrases))


def _index(phrases: Iterable[str]) -> dict[int, NDArray[np.uint64]]:
    """Return the hashes of phrases by their number of words."""
    found: dict[int, list[np.uint64]] = {}
    for phrase in phrases:
        words = word_hashes(phrase)
        if len(words):
            found.setdefault(len(words), []).append(ngram_hashes(words, len(words))[0])
    return {length: np.array(hashes, np.uint64) for length, hashes in found.items()}


def _count(words: NDArray[np.uint64], index: Mapping[int, NDArray[np.uint64]]) -> int:
    return sum(
        int(np.isin(ngram_hashes(words, length), hashes, kind="sort").sum())  # NumPy 2.0's table overflows
        for length, hashes in index.items()
        if len(words) >= length
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordList(Filter, limits={"max_listed": Limit.NON_NEGATIVE, "max_listed_per_word": Limit.NON_NEGATIVE}):
    """Removes documents in which words of a list occur too often. The list is the user's; none comes with this package.

    Args:
        path: File with one word or phrase a line, UTF-8.
        words: Words and phrases beside those of the file.
        max_listed: Most occurrences; ``None`` for no limit.
        max_listed_per_word: Most occurrences per word of the document; ``None`` for no limit.

    Raises:
        ConfigurationError: If there is neither a file nor a word.
    """

    path: str | None = None
    words: tuple[str, ...] = ()
    max_listed: int | None = 0
    max_listed_per_word: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None and not self.words:
            raise ConfigurationError(
                "WordList needs path=, a file with one word or phrase a line, or words=['...', '...']."
            )

    def measures(self, document: Document) -> Mapping[str, float]:
        """Return the number of listed words, and the same per word of the document.

        Args:
            document: The document.
        """
        words = word_hashes(document.text)
        count = _count(words, self._hashes)
        return {"listed_words": count, "listed_words_per_word": count / max(len(words), 1)}

    def bounds(self) -> Mapping[str, Bounds]:
        """Return the limits by the name of the quantity."""
        return {
            "listed_words": Bounds(maximum=self.max_listed),
            "listed_words_per_word": Bounds(maximum=self.max_listed_per_word),
        }

    @functools.cached_property
    def _hashes(self) -> dict[int, NDArray[np.uint64]]:
        lines: list[str] = []
        if self.path is not None:
            try:
                lines = Path(self.path).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"The word list {self.path} cannot be read: {error}. It must be a UTF-8 text."
                ) from error
        return _index([*lines, *self.words])

"""Word n-grams of a text as sets of 32-bit hashes, for near-duplicates and contamination.

Two copies of a text seldom agree to the byte, so letters are decomposed (NFD) and in lower case, and everything that
is neither letter, mark nor digit separates words.
"""

import unicodedata

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.words import codes_of, combine_ngrams, hash_words, holds_for, pieces_of, word_edges

__all__ = ["jaccard", "ngram_hashes", "shingles", "word_hashes"]


def word_hashes(text: str) -> NDArray[np.uint64]:
    """Return the hashes of the words of a text in normal form, uint64 [words].

    Args:
        text: Text of a document.
    """
    text = text.lower()
    if not text.isascii():
        text = unicodedata.normalize("NFD", text)
    pieces = [_hashes_of_piece(piece) for piece in pieces_of(text)]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Return the hashes of all word n-grams in order; of a text shorter than n words, that of the whole text.

    Args:
        words: uint64 [words], hashes of words.
        n: Words of an n-gram.
    """
    n = min(n, len(words))
    ngrams = words[: len(words) - n + 1] if n else words
    for offset in range(1, n):
        ngrams = combine_ngrams(ngrams, words[offset : len(words) - n + 1 + offset])
    return ngrams


def shingles(text: str, n: int) -> NDArray[np.uint32]:
    """Return the set of the word n-grams of a text: sorted, distinct 32-bit hashes.

    Args:
        text: Text of a document.
        n: Words of a shingle.
    """
    hashes = (ngram_hashes(word_hashes(text), n) >> np.uint64(32)).astype(np.uint32)
    hashes.sort()
    if len(hashes) < 2:
        return hashes
    distinct = np.ones(len(hashes), bool)
    np.not_equal(hashes[1:], hashes[:-1], out=distinct[1:])
    return hashes[distinct]


def jaccard(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> float:
    """Return the Jaccard index of two sets; 0 if one is empty.

    Args:
        first: Sorted, distinct hashes.
        second: Sorted, distinct hashes.
    """
    both = np.concatenate((first, second))
    both.sort()
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    return common / (len(both) - common) if common else 0.0


def _hashes_of_piece(piece: str) -> NDArray[np.uint64]:
    codes = codes_of(piece)
    in_word = holds_for(codes, _is_in_word)
    return hash_words(codes, *word_edges(~in_word))


def _is_in_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"

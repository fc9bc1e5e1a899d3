"""Words of a text as arrays: hash, length and whether there is a letter, for rules that count words and n-grams.

Words are what stands between white space. Everything is computed on code points with numpy: a cumulative polynomial
hash gives the hash of each word as a difference, so that no string is made for a word. The hashes are the same in every
process and on every machine.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Words", "combine_ngrams", "hash_of_word", "words_of"]

_BLOCK = 1 << 18
"""Characters hashed at a time, which bounds the memory for a long text."""
_MULTIPLIER = 0x9E3779B97F4A7C15
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)
_CODE_POINTS = 0x110000


@dataclass(frozen=True, slots=True)
class Words:
    """Words of one text, in order.

    Args:
        hashes: uint64 [words], equal for equal words.
        lengths: int64 [words], characters.
        num_letters: int64 [words], alphabetic characters.
    """

    hashes: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    num_letters: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.hashes)


@functools.lru_cache(maxsize=1)
def words_of(text: str) -> Words:
    """Return the words of a text. The last result is kept, since several rules read one document after another.

    Args:
        text: Text of a document.
    """
    blocks = [_words_of_block(codes) for codes in _blocks(text)]
    if len(blocks) == 1:
        return blocks[0]
    return Words(
        np.concatenate([block.hashes for block in blocks]),
        np.concatenate([block.lengths for block in blocks]),
        np.concatenate([block.num_letters for block in blocks]),
    )


@functools.lru_cache(maxsize=4096)
def hash_of_word(word: str) -> np.uint64:
    """Return the hash that `words_of` gives a word.

    Args:
        word: Text without white space.
    """
    return np.uint64(_words_of_block(_codes(word)).hashes[0])


def combine_ngrams(prefixes: NDArray[np.uint64], last_words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the hashes of n-grams.

    Args:
        prefixes: uint64 [ngrams], hashes of their first n - 1 words.
        last_words: uint64 [ngrams], hashes of their last words.
    """
    return (prefixes ^ (prefixes >> np.uint64(29))) * np.uint64(_MULTIPLIER) + last_words


def _blocks(text: str) -> Iterator[NDArray[np.integer]]:
    """Yield code points of pieces of a text, cut at white space if there is any in the second half of a piece."""
    start = 0
    while len(text) - start > _BLOCK:
        codes = _codes(text[start : start + _BLOCK])
        spaces = np.flatnonzero(_is_space(codes)[_BLOCK // 2 :])
        length = _BLOCK // 2 + int(spaces[-1]) if len(spaces) else _BLOCK
        yield codes[:length]
        start += length
    yield _codes(text[start:])


def _codes(text: str) -> NDArray[np.integer]:
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _words_of_block(codes: NDArray[np.integer]) -> Words:
    is_space = _is_space(codes)
    padded = np.ones(len(codes) + 2, bool)
    padded[1:-1] = is_space
    edges = (padded[1:] != padded[:-1]).nonzero()[0]
    starts, ends = edges[::2], edges[1::2]
    powers, inverses = _powers()
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(_code_hashes(codes) * powers[: len(codes)], out=sums[1:])
    hashes = (sums[ends] - sums[starts]) * inverses[starts]
    letters = np.zeros(len(codes) + 1, np.int64)
    np.cumsum(_is_letter(codes), out=letters[1:])
    return Words(hashes, ends - starts, letters[ends] - letters[starts])


def _code_hashes(codes: NDArray[np.integer]) -> NDArray[np.uint64]:
    if codes.dtype == np.uint8:
        return _ascii_hashes().take(codes)
    return _mix(codes.astype(np.uint64))


def _mix(codes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return well distributed numbers: the finalizer of splitmix64 (Steele et al. 2014)."""
    mixed = (codes + np.uint64(1)) * np.uint64(_MULTIPLIER)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _is_space(codes: NDArray[np.integer]) -> NDArray[np.bool_]:
    return (_ascii_spaces() if codes.dtype == np.uint8 else _spaces()).take(codes)


def _is_letter(codes: NDArray[np.integer]) -> NDArray[np.bool_]:
    return (_ascii_letters() if codes.dtype == np.uint8 else _letters()).take(codes)


@functools.cache
def _powers() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the powers of the multiplier, and of its inverse modulo 2**64."""
    pair = []
    for base in (_MULTIPLIER, _INVERSE):
        powers = np.full(_BLOCK + 1, base, np.uint64)
        powers[0] = 1
        pair.append(np.cumprod(powers))
    return pair[0], pair[1]


@functools.cache
def _ascii_hashes() -> NDArray[np.uint64]:
    return _mix(np.arange(256, dtype=np.uint64))


@functools.cache
def _ascii_spaces() -> NDArray[np.bool_]:
    return np.array([chr(code).isspace() for code in range(256)])


@functools.cache
def _ascii_letters() -> NDArray[np.bool_]:
    return np.array([chr(code).isalpha() for code in range(256)])


@functools.cache
def _spaces() -> NDArray[np.bool_]:
    return np.fromiter((chr(code).isspace() for code in range(_CODE_POINTS)), bool, _CODE_POINTS)


@functools.cache
def _letters() -> NDArray[np.bool_]:
    return np.fromiter((chr(code).isalpha() for code in range(_CODE_POINTS)), bool, _CODE_POINTS)

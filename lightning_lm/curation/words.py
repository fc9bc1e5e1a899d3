"""Words of a text as arrays: hash, length and whether there is a letter, for rules that count words and n-grams.

Words are what stands between white space. Everything is computed on code points with numpy: a cumulative polynomial
hash gives the hash of each word as a difference, so that no string is made for a word. The hashes are the same in every
process and on every machine.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Words",
    "codes_of",
    "combine_ngrams",
    "hash_of_word",
    "hash_words",
    "holds_for",
    "pieces_of",
    "word_edges",
    "words_of",
]

_PIECE = 1 << 18
"""Characters hashed at a time, which bounds the memory for a long text."""
_MULTIPLIER = 0x9E3779B97F4A7C15
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)


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
    parts = [_words_of_piece(codes_of(piece)) for piece in pieces_of(text)]
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in dataclasses.fields(Words)]
    return Words(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@functools.lru_cache(maxsize=4096)
def hash_of_word(word: str) -> np.uint64:
    """Return the hash that `words_of` gives a word.

    Args:
        word: Text without white space.
    """
    return np.uint64(_words_of_piece(codes_of(word)).hashes[0])


def combine_ngrams(prefixes: NDArray[np.uint64], last_words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the hashes of n-grams.

    Args:
        prefixes: uint64 [ngrams], hashes of their first n - 1 words.
        last_words: uint64 [ngrams], hashes of their last words.
    """
    return (prefixes ^ (prefixes >> np.uint64(29))) * np.uint64(_MULTIPLIER) + last_words


def pieces_of(text: str) -> Iterator[str]:
    """Yield a text in pieces, cut before a space or line break if there is one in the second half of a piece.

    Args:
        text: Text of a document.
    """
    start = 0
    while len(text) - start > _PIECE:
        half, stop = start + _PIECE // 2, start + _PIECE
        cut = max(text.rfind(" ", half, stop), text.rfind("\n", half, stop))
        yield text[start : cut if cut > 0 else stop]
        start = cut if cut > 0 else stop
    yield text[start:] if start else text


def codes_of(piece: str) -> NDArray[Any]:
    """Return the code points of a text, uint8 for ASCII and else uint32.

    Args:
        piece: Text, lone surrogates included.
    """
    if piece.isascii():
        return np.frombuffer(piece.encode(), np.uint8)
    return np.frombuffer(piece.encode("utf-32-le", "surrogatepass"), np.uint32)


def word_edges(is_space: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where words begin and where they end.

    Args:
        is_space: bool [characters], true between words.
    """
    padded = np.ones(len(is_space) + 2, bool)
    padded[1:-1] = is_space
    edges = (padded[1:] != padded[:-1]).nonzero()[0]
    return edges[::2], edges[1::2]


def hash_words(codes: NDArray[Any], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the hash of each word, the same for uint8 and uint32 code points.

    Args:
        codes: Code points of at most one piece of a text.
        starts: int64 [words].
        ends: int64 [words].
    """
    powers, inverses = _powers()
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(_code_hashes(codes) * powers[: len(codes)], out=sums[1:])
    return (sums[ends] - sums[starts]) * inverses[starts]


def _words_of_piece(codes: NDArray[Any]) -> Words:
    starts, ends = word_edges(_is_space(codes))
    letters = np.zeros(len(codes) + 1, np.int64)
    np.cumsum(_is_letter(codes), out=letters[1:])
    return Words(hash_words(codes, starts, ends), ends - starts, letters[ends] - letters[starts])


def _code_hashes(codes: NDArray[Any]) -> NDArray[np.uint64]:
    if codes.dtype == np.uint8:
        return _ascii_hashes().take(codes)
    return _mix(codes.astype(np.uint64))


def _mix(codes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return well distributed numbers: the finalizer of splitmix64 (Steele et al. 2014)."""
    mixed = (codes + np.uint64(1)) * np.uint64(_MULTIPLIER)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@functools.cache
def _powers() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the powers of the multiplier, and of its inverse modulo 2**64."""
    pair = []
    for base in (_MULTIPLIER, _INVERSE):
        powers = np.full(_PIECE + 1, base, np.uint64)
        powers[0] = 1
        pair.append(np.cumprod(powers))
    return pair[0], pair[1]


@functools.cache
def _ascii_hashes() -> NDArray[np.uint64]:
    return _mix(np.arange(256, dtype=np.uint64))


def holds_for(codes: NDArray[Any], holds: Callable[[str], bool]) -> NDArray[np.bool_]:
    """Return whether a predicate holds for each of some code points.

    Args:
        codes: Result of `codes_of`.
        holds: Function of one character, asked once for each code point of the planes that occur.
    """
    if codes.dtype == np.uint8:
        return _table(holds, 256).take(codes)
    planes = (int(codes.max(initial=0)) >> 16) + 1
    return _table(holds, planes << 16).take(codes)


@functools.cache
def _table(holds: Callable[[str], bool], size: int) -> NDArray[np.bool_]:
    return np.fromiter((holds(chr(code)) for code in range(size)), bool, size)


def _is_space(codes: NDArray[Any]) -> NDArray[np.bool_]:
    return holds_for(codes, str.isspace)


def _is_letter(codes: NDArray[Any]) -> NDArray[np.bool_]:
    return holds_for(codes, str.isalpha)

"""A seeded shuffle of any size without an index array: a cipher that maps each position to another one.

An array of ten billion row numbers takes 80 GB and has to be built again each epoch. A Feistel network computes any
entry of it alone, in constant time, and is a bijection by construction.
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["key_of", "permute"]

_ROUNDS = 6


def key_of(*parts: int | str) -> int:
    """Return a 64-bit key that depends on every part, so that no two uses of one seed have the same shuffle."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permute(indices: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Return where a keyed permutation of ``range(size)`` sends each index.

    A position is written as ``left + a * right`` with ``a * b >= size``; each round adds a keyed hash of one half to
    the other, modulo its radix, which can be undone and therefore is a bijection of ``range(a * b)``. Positions that
    land outside ``range(size)`` are sent on until they are inside (cycle walking); fewer than one in ``a`` is.

    Args:
        indices: Positions in ``range(size)``, any shape.
        size: Number of positions, at least 1.
        key: Key of the permutation; see `key_of`.

    Source:
        Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", sections 4 (cycle walking) and 5
        (generalised Feistel).
    """
    a = max(1, math.isqrt(max(size - 1, 0)) + 1)
    b = -(-size // a)
    values = _feistel(indices.astype(np.uint64), a, b, key)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values.flat[outside] = _feistel(values.flat[outside], a, b, key)
        outside = outside[values.flat[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], a: int, b: int, key: int) -> NDArray[np.uint64]:
    radix_a, radix_b = np.uint64(a), np.uint64(b)
    right, left = np.divmod(values, radix_a)
    for number in range(_ROUNDS):
        round_key = np.uint64(key_of(key, number))
        if number % 2:
            right = (right + _hash(left, round_key) % radix_b) % radix_b
        else:
            left = (left + _hash(right, round_key) % radix_a) % radix_a
    return left + radix_a * right


def _hash(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Mix 64 bits so that each output bit depends on all of them (Steele et al. 2014, SplitMix64)."""
    mixed = values ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))

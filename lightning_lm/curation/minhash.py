"""MinHash signatures and their bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3).

A signature has the smallest value of each of many random permutations over the shingles of a text; two texts agree in
one of them with a probability that is their Jaccard index. Texts that agree in all rows of one band are candidates.
Permutations are ``multiplier * hash + offset`` modulo 2**32 with an odd multiplier, which is one: there is no prime
and no product that could overflow.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

__all__ = ["MinHash", "collision_probability"]

_AT_A_TIME = 1 << 16
"""Shingles that are permuted together, those of whole documents, so that the products stay in a core's cache."""


def collision_probability(similarity: float, bands: int, rows: int) -> float:
    """Return the probability that two texts share a band.

    Args:
        similarity: Their Jaccard index.
        bands: Number of bands.
        rows: Permutations of a band.

    Example:
        >>> round(collision_probability(0.8, bands=16, rows=8), 3)
        0.947
    """
    return float(1 - (1 - similarity**rows) ** bands)


class MinHash:
    """Permutations drawn from a seed.

    Args:
        bands: Number of bands.
        rows: Permutations of a band.
        seed: Seed of the permutations.
    """

    def __init__(self, bands: int, rows: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        size = bands * rows
        self._multipliers = random.integers(0, 1 << 32, size, np.uint32, endpoint=False) | np.uint32(1)
        self._offsets = random.integers(0, 1 << 32, size, np.uint32, endpoint=False)
        self._bands, self._rows = bands, rows

    def signatures(self, shingles: NDArray[np.uint32], sizes: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Return the smallest value of each permutation over each set, uint32 [sets, bands * rows]; 0 for an empty set.

        Args:
            shingles: Hashes of the shingles of all sets, one set after the other.
            sizes: int64 [sets], shingles of each set.
        """
        signatures = np.zeros((len(sizes), len(self._multipliers)), np.uint32)
        filled, begins = np.flatnonzero(sizes), (np.cumsum(sizes) - sizes)[sizes > 0]
        groups = np.searchsorted(begins, np.arange(0, len(shingles), _AT_A_TIME))
        for first, last in itertools.pairwise(np.unique(np.append(groups, len(filled))).tolist()):
            start, stop = begins[first], begins[last] if last < len(filled) else len(shingles)
            values, edges = shingles[start:stop], begins[first:last] - start
            permuted = np.empty_like(values)
            for index, (multiplier, offset) in enumerate(zip(self._multipliers, self._offsets, strict=True)):
                np.multiply(values, multiplier, out=permuted)
                permuted += offset
                signatures[filled[first:last], index] = np.minimum.reduceat(permuted, edges)
        return signatures

    def band_keys(self, signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """Return one hash for each band of each signature, uint64 [bands, documents].

        Args:
            signatures: uint32 [documents, bands * rows].
        """
        rows = signatures.reshape(len(signatures), self._bands, self._rows).astype(np.uint64)
        keys = np.zeros(rows.shape[:2], np.uint64)
        for row in range(self._rows):
            keys = (keys ^ (keys >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) + rows[:, :, row]
        return np.ascontiguousarray(keys.T)

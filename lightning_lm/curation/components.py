"""Connected components of documents, by union-find (Tarjan 1975)."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["Components"]


class Components:
    """Sets of indices that grow together.

    Args:
        size: Number of indices; each begins as a set of its own.
    """

    def __init__(self, size: int) -> None:
        self._parents = np.arange(size)

    def find(self, index: int) -> int:
        """Return the smallest index of a set.

        Args:
            index: An index of the set.
        """
        parents, root = self._parents, index
        while parents[root] != root:
            root = int(parents[root])
        while parents[index] != root:
            parents[index], index = root, int(parents[index])
        return root

    def join(self, first: int, second: int) -> None:
        """Make one set of two.

        Args:
            first: An index of one set.
            second: An index of the other.
        """
        one, other = self.find(first), self.find(second)
        self._parents[max(one, other)] = min(one, other)

    def groups(self) -> Iterator[NDArray[np.int64]]:
        """Yield the sorted indices of each set with two or more."""
        roots = self._parents
        while not np.array_equal(roots, roots[roots]):
            roots = roots[roots]
        order = np.argsort(roots, kind="stable")
        _, begins = np.unique(roots[order], return_index=True)
        yield from (group for group in np.split(order, begins[1:]) if len(group) > 1)

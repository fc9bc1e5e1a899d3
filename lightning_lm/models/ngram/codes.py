"""N-grams coded as integers: the row of the first n - 1 symbols in the table below, and the last symbol.

``code = prefix_row * base + symbol`` fits into 64 bits for every order and vocabulary, because a prefix of an n-gram
in a text is an n-gram of that text too: rows are counted, not letters. A sorted array of codes is a trie, the
continuations of a prefix are neighbours, and `numpy.searchsorted` follows all positions of a text at once.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["CHUNK", "Rows", "find", "insert_starts", "spans", "walk"]

CHUNK = 1 << 21
"""Symbols, or rows of a table, that are worked on at once."""

Rows = NDArray[np.int64]
"""Row of a table for each position; -1 if there is none."""


def find(codes: NDArray[np.int64], wanted: NDArray[np.int64]) -> Rows:
    """Return the row of each wanted code, -1 for one that is not there.

    The wanted codes are looked up in sorted order: neighbours then read the same part of a large table.

    Args:
        codes: Sorted codes of a table.
        wanted: Codes in any order; negative ones are never there.
    """
    if not len(codes):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(wanted)
    ordered = wanted[order]
    rows = np.minimum(np.searchsorted(codes, ordered), len(codes) - 1)
    rows[codes[rows] != ordered] = -1
    found = np.empty_like(rows)
    found[order] = rows
    return found


def insert_starts(tokens: NDArray[np.integer], ends: NDArray[np.int64], start: int) -> NDArray[np.int64]:
    """Return documents one after the other, each behind a symbol for its start.

    Args:
        tokens: Token ids of all documents.
        ends: End of each document in ``tokens``.
        start: The symbol.
    """
    begins = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
    return np.insert(tokens.astype(np.int64), begins, start)


def walk(tables: list[NDArray[np.int64]], symbols: NDArray[np.int64], base: int) -> Iterator[tuple[Rows, Rows]]:
    """Yield, order by order from 2 on, the row of the n-gram that ends at each symbol, and that of its prefix.

    Args:
        tables: Sorted codes of the orders 2, 3, ...
        symbols: A text; the symbol ``base - 1`` starts a document, and no n-gram reaches back over it.
        base: Number of symbols.
    """
    rows = symbols
    inside = symbols != base - 1
    for codes in tables:
        prefixes = np.concatenate((np.full(1, -1, np.int64), rows[:-1]))
        prefixes[~inside] = -1
        rows = find(codes, np.where(prefixes < 0, -1, prefixes * base + symbols))
        yield rows, prefixes


def spans(codes: NDArray[np.int64], base: int, size: int = CHUNK) -> Iterator[slice]:
    """Yield slices of a table of about ``size`` rows that keep the continuations of a prefix together.

    Args:
        codes: Sorted codes.
        base: Number of symbols.
        size: Rows of a slice.
    """
    begin = 0
    while begin < len(codes):
        end = min(begin + size, len(codes))
        if end < len(codes):
            next_prefix = int(codes[end - 1]) // base + 1
            end = int(np.searchsorted(codes, next_prefix * base))
        yield slice(begin, end)
        begin = end

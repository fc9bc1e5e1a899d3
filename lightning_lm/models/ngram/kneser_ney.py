"""Interpolated modified Kneser-Ney smoothing.

The highest order has counts of occurrences; an n-gram below it is counted by the number of symbols that precede it,
because it is asked for only where a longer context is unknown. A discount, by whether the count is 1, 2 or more, is
taken from every count and given to the order below, and under the first order to all ids alike::

    p(w | h) = (c(h w) - D(c(h w))) / c(h) + gamma(h) p(w | h')     gamma(h) = (D1 N1(h) + D2 N2(h) + D3 N3+(h)) / c(h)

N-grams at the start of a document have no predecessor, and keep their occurrences (as in KenLM).

Source:
    Chen & Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", section 3; discounts:
    equation 26. Kneser & Ney 1995.
"""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.models.ngram.codes import CHUNK, find, spans
from lightning_lm.models.ngram.counts import Documents, Workspace, count_ngrams
from lightning_lm.models.ngram.model import NgramModel, Table

__all__ = ["discounts", "fit_ngram"]

_FALLBACK = 0.75


def fit_ngram(
    parts: Iterable[Documents],
    *,
    order: int,
    vocab_size: int,
    workspace: Workspace | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> NgramModel:
    """Return the n-gram model of a text, with interpolated modified Kneser-Ney smoothing.

    Args:
        parts: Documents, each part their token ids one after the other and where each ends.
        order: Symbols of the longest n-gram, the predicted one included.
        vocab_size: Number of token ids. Each has a positive probability everywhere.
        workspace: Place of the tables; in memory by default.
        advance: Is told how many symbols have been counted, ``order`` times the length of the text in the end.

    Raises:
        ConfigurationError: If the order or the vocabulary is empty.
        DataError: If there is no text, or an id is outside the vocabulary.
    """
    if order < 1 or vocab_size < 1:
        raise ConfigurationError(f"order={order} and vocab_size={vocab_size} must be at least 1.")
    parts = [(tokens, np.asarray(ends, np.int64)) for tokens, ends in parts if len(tokens)]
    if not parts:
        raise DataError("There is no text to count n-grams in. Check the path of the corpus.")
    for tokens, _ in parts:
        if (largest := int(tokens.max())) >= vocab_size or int(tokens.min()) < 0:
            raise DataError(
                f"Token id {largest} does not fit vocab_size={vocab_size}; was it made by another tokenizer?"
            )
    workspace = workspace or Workspace()
    counted = count_ngrams(parts, order, vocab_size, workspace, advance)
    tables = [codes for codes, _ in counted]
    suffixes = _suffixes(tables, vocab_size + 1, workspace)
    counts = _adjusted([counts for _, counts in counted], suffixes, _at_start(tables, vocab_size, workspace))
    return _smoothed(tables, counts, suffixes, workspace)


def discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the discount of n-grams that are counted 0, 1, 2, and 3 or more times.

    Args:
        counts: Adjusted counts of all n-grams of an order.

    Returns:
        float64 [4]. All are 0.75 if the counts have too few small numbers for the estimate, which is then undefined,
        or no discount at all for some count.
    """
    n1, n2, n3, n4 = (int((counts == size).sum()) for size in (1, 2, 3, 4))
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        values = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (values[1:] > 0).all():
            return values
    return np.array([0.0, _FALLBACK, _FALLBACK, _FALLBACK])


def _suffixes(tables: list[NDArray[np.int64]], base: int, workspace: Workspace) -> list[NDArray[np.int64]]:
    """Return for each n-gram, order by order, the row of its last n - 1 symbols in the table below."""
    suffixes = [np.zeros(len(tables[0]), np.int64)]  # all symbols have the empty one
    for length in range(1, len(tables)):
        rows = workspace.array(len(tables[length]), np.int64)
        for begin in range(0, len(rows), CHUNK):
            span = slice(begin, begin + CHUNK)
            prefixes, symbols = np.divmod(tables[length][span], base)
            rows[span] = (
                symbols if length == 1 else find(tables[length - 1], suffixes[length - 1][prefixes] * base + symbols)
            )
        suffixes.append(rows)
    return suffixes


def _at_start(tables: list[NDArray[np.int64]], start: int, workspace: Workspace) -> list[NDArray[np.bool_]]:
    """Return which n-grams begin with the start of a document."""
    masks = [np.arange(start + 1) == start]
    for codes in tables[1:]:
        mask = workspace.array(len(codes), np.bool_)
        for begin in range(0, len(codes), CHUNK):
            mask[begin : begin + CHUNK] = masks[-1][codes[begin : begin + CHUNK] // (start + 1)]
        masks.append(mask)
    return masks


def _adjusted(
    counts: list[NDArray[np.int64]], suffixes: list[NDArray[np.int64]], at_start: list[NDArray[np.bool_]]
) -> list[NDArray[np.int64]]:
    """Replace the counts below the highest order by numbers of predecessors; the start itself is never predicted."""
    for length in range(len(counts) - 1):
        rows, own = suffixes[length + 1], counts[length]
        own[~at_start[length]] = 0
        for begin in range(0, len(rows), CHUNK):
            np.add.at(own, rows[begin : begin + CHUNK], 1)
    counts[0][-1] = 0
    return counts


def _smoothed(
    tables: list[NDArray[np.int64]],
    counts: list[NDArray[np.int64]],
    suffixes: list[NDArray[np.int64]],
    workspace: Workspace,
) -> NgramModel:
    smoothed = [_unigrams(counts[0])]
    for codes, own, suffix in zip(tables[1:], counts[1:], suffixes[1:], strict=True):
        below = smoothed[-1]
        above = Table(codes, workspace.array(len(codes), np.float64), workspace.array(len(codes), np.float64))
        discount = discounts(own)
        for span in spans(codes, len(tables[0])):
            prefixes = codes[span] // len(tables[0])
            firsts = np.flatnonzero(np.concatenate((np.ones(1, bool), prefixes[1:] != prefixes[:-1])))
            sizes = np.diff(firsts, append=len(prefixes))
            taken = discount[np.minimum(own[span], 3)]
            totals = np.add.reduceat(own[span], firsts)
            gamma = np.add.reduceat(taken, firsts) / totals
            below.log_backoffs[prefixes[firsts]] = np.log(gamma)
            known = (own[span] - taken) / np.repeat(totals, sizes)
            above.log_probs[span] = np.log(known + np.repeat(gamma, sizes) * np.exp(below.log_probs[suffix[span]]))
        smoothed.append(above)
    return NgramModel(smoothed)


def _unigrams(counts: NDArray[np.int64]) -> Table:
    """Return the first table: a row for every id, and one for the start of a document, which is never predicted."""
    taken, total = discounts(counts)[np.minimum(counts, 3)], counts.sum()
    probabilities = (counts - taken) / total + taken.sum() / total / (len(counts) - 1)
    log_probs = np.append(np.log(probabilities[:-1]), -np.inf)
    return Table(np.arange(len(counts)), log_probs, np.zeros(len(counts)))

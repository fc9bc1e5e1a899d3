"""The rows of one store: which documents lie in a row, and the arrays that a model is fed with."""

import functools

import numpy as np
from numpy.typing import NDArray

from lightning_lm.data.packing import Packing, RowPlan, count_up
from lightning_lm.data.permutation import key_of, permute
from lightning_lm.data.store import TokenStore
from lightning_lm.errors import DataError
from lightning_lm.types import IGNORE_INDEX

__all__ = ["StoreRows", "blank_rows"]

Ints = NDArray[np.int64]
Rows = dict[str, Ints]

_WINDOW = 1 << 20
_BLOCK = 1 << 12


class StoreRows:
    """The rows of one store, epoch after epoch.

    Documents are shuffled once and planned in windows of about a million, so that a plan fits in memory whatever the
    corpus; each epoch reshuffles the windows, and the rows within each window.

    Args:
        store: Token store.
        packing: Layout of documents in rows.
        row_length: Tokens of a row.
        key: Key of the order; None keeps that of the store.

    Raises:
        DataError: If there is not one row.
    """

    def __init__(self, store: TokenStore, packing: Packing, row_length: int, key: int | None) -> None:
        self.store = store
        self._packing, self._row_length, self._key = packing, row_length, key
        self._context = 0 if store.bos_id is None else 1
        self._num_windows = -(-len(store) // _WINDOW)
        self._plan = functools.lru_cache(maxsize=2)(self._plan_window)
        self._epoch = functools.lru_cache(maxsize=4)(self._order_windows)
        self._block = functools.lru_cache(maxsize=16)(self._order_rows)
        self.num_targets = 0
        self._rows_in = np.zeros(self._num_windows, dtype=np.int64)
        for window in range(self._num_windows):
            plan = self._plan(window)
            self._rows_in[window] = plan.num_rows
            self.num_targets += int(plan.lengths.sum())
        self.num_rows = int(self._rows_in.sum())
        if not self.num_rows:
            raise DataError(
                f"{store.path} gives no row: none of its {len(store)} document(s) with {store.num_tokens} token(s) has "
                f"a token to predict, or all are longer than {row_length - 1} tokens and {packing} leaves them out."
            )

    def __reduce__(self) -> tuple[type["StoreRows"], tuple[object, ...]]:
        return StoreRows, (self.store, self._packing, self._row_length, self._key)

    def fill(self, rows: Rows, places: Ints, numbers: Ints) -> None:
        """Write the rows with these indices into the given positions of padding rows."""
        epochs, within = np.divmod(numbers, self.num_rows)
        for epoch in np.unique(epochs).tolist():
            order, starts = self._epoch(epoch)
            turns = np.searchsorted(starts, within, side="right") - 1
            for turn in np.unique(turns[epochs == epoch]).tolist():
                chosen = np.flatnonzero((epochs == epoch) & (turns == turn))
                window = int(order[turn])
                numbers_in_window = self._shuffled(epoch, window, within[chosen] - starts[turn])
                self._write(rows, places[chosen], self._plan(window), numbers_in_window)

    def _plan_window(self, window: int) -> RowPlan:
        begin, end = (len(self.store) * edge // self._num_windows for edge in (window, window + 1))
        documents = np.arange(begin, end)
        if self._key is not None:
            documents = permute(documents, len(self.store), key_of(self._key, "documents"))
        ends = self.store.ends
        lengths = ends[documents] - np.where(documents > 0, ends[documents - 1], 0)
        plan = self._packing.plan(lengths - 1 + self._context, self._row_length)
        return plan._replace(documents=documents[plan.documents])

    def _order_windows(self, epoch: int) -> tuple[Ints, Ints]:
        """Return the windows in the order of an epoch, and the number of rows before each."""
        order = np.arange(self._num_windows)
        if self._key is not None:
            order = permute(order, self._num_windows, key_of(self._key, "windows", epoch))
        rows_in = self._rows_in[order]
        return order, np.cumsum(rows_in) - rows_in

    def _shuffled(self, epoch: int, window: int, numbers: Ints) -> Ints:
        if self._key is None:
            return numbers
        blocks, places = np.divmod(numbers, _BLOCK)
        shuffled = np.empty_like(numbers)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            shuffled[here] = self._block(epoch, window, block)[places[here]]
        return shuffled

    def _order_rows(self, epoch: int, window: int, block: int) -> Ints:
        """Return a block of the permutation of a window's rows: one at a time is slow."""
        num_rows = int(self._rows_in[window])
        numbers = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, num_rows))
        return permute(numbers, num_rows, key_of(self._key or 0, "rows", epoch, window))

    def _write(self, rows: Rows, places: Ints, plan: RowPlan, numbers: Ints) -> None:
        begin, end = plan.row_starts[numbers], plan.row_starts[numbers + 1]
        rank = count_up(end - begin)
        fragments = np.repeat(begin, end - begin) + rank
        row_of = np.repeat(np.arange(len(numbers)), end - begin)
        documents, offsets, cells = plan.documents[fragments], plan.offsets[fragments], plan.lengths[fragments] + 1

        # `first` is where each fragment begins among all cells that are written, `column` where it begins in its row.
        first = np.cumsum(cells) - cells
        column = first - first[np.searchsorted(row_of, row_of)]
        inside = count_up(cells)
        at = np.repeat(places[row_of], cells), np.repeat(column, cells) + inside

        starts = np.where(documents > 0, self.store.ends[documents - 1], 0) + offsets - self._context
        cells_of = np.maximum(np.repeat(starts, cells) + inside, 0)
        tokens = self.store.tokens[cells_of].astype(np.int64)
        if self.store.bos_id is not None:
            tokens[first[offsets == 0]] = self.store.bos_id
        rows["input_ids"][at] = tokens
        tokens[first] = IGNORE_INDEX
        if self.store.learned is not None:
            tokens[~self.store.learned[cells_of]] = IGNORE_INDEX
        rows["labels"][at] = tokens
        rows["position_ids"][places] -= np.bincount(row_of, cells, len(numbers)).astype(np.int64)[:, None]
        rows["position_ids"][at] = inside
        rows["document_ids"][places] = (end - begin)[:, None]
        rows["document_ids"][at] = np.repeat(rank, cells)


def blank_rows(num_rows: int, row_length: int) -> Rows:
    """Return rows of padding: one document of token 0 without target tokens."""
    shape = num_rows, row_length
    return {
        "input_ids": np.zeros(shape, dtype=np.int64),
        "labels": np.full(shape, IGNORE_INDEX, dtype=np.int64),
        "position_ids": np.tile(np.arange(row_length), (num_rows, 1)),
        "document_ids": np.zeros(shape, dtype=np.int64),
    }

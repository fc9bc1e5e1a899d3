"""A key-value cache whose rows come and go: the memory of continuous batching.

Every row starts in column 0 and ends in a column of its own, as rows do after speculative decoding. A prompt joins by
being read into the next free row, and a row that leaves is replaced by the last one, so the keys of the other rows stay
where they are. Orca (Yu et al. 2022, OSDI) schedules in this way; vLLM (Kwon et al. 2023, arXiv:2309.06180) also cuts
the rows into pages. Here a row is contiguous, because the attention of torch has no page tables: a short row is
attended under a mask as wide as the longest one, and layers with a sliding window keep all columns.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.generation.forward import head_logits
from lightning_lm.models import prompt_is_prefix
from lightning_lm.models.cache import KVCache, LayerCache
from lightning_lm.models.position_bias import PositionBias
from lightning_lm.protocols import LanguageModel

__all__ = ["Block", "SlotForward", "supports_slots"]

Block = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer for neighbouring tokens of one row, [kv_heads, tokens, head_dim]."""

_COLUMNS = 64
"""Columns are added in multiples of this number."""


def supports_slots(model: Any) -> bool:
    """Return whether a model's cache consists of keys and values only, which rows of different lengths can share.

    Args:
        model: Any model.
    """
    if not hasattr(model, "make_cache") or not isinstance(model, LanguageModel):
        return False
    own: Any = model
    if any(isinstance(module, PositionBias) for module in own.modules()):  # rows end in columns of their own
        return False
    if prompt_is_prefix(own):  # a beginning that prompts share is read differently for each
        return False
    cache = own.make_cache(1, 1)
    return isinstance(cache, KVCache) and all(type(layer) is LayerCache for layer in cache.layers)


class _SlotLayer:
    """Keys and values of one layer in all rows, [rows, kv_heads, columns, head_dim]."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def fit(self, keys: Tensor, values: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return the buffers, enlarged to the given shape."""
        if self.keys is None or self.values is None or (self.keys.size(0), self.keys.size(2)) != (rows, columns):
            self.keys = _resized(self.keys, keys, rows, columns)
            self.values = _resized(self.values, values, rows, columns)
        return self.keys, self.values


def _resized(old: Tensor | None, like: Tensor, rows: int, columns: int) -> Tensor:
    """Return zeros that begin with the old content; a mask hides columns without a token, but not NaN."""
    new = like.new_zeros((rows, like.size(1), columns, like.size(3)))
    if old is not None:
        rows, columns = min(rows, old.size(0)), min(columns, old.size(2))
        new[:rows, :, :columns] = old[:rows, :, :columns]
    return new


class _RowsOfLayer(LayerCache):
    """Neighbouring rows of a layer, in the form that attention appends to."""

    def __init__(self, layer: _SlotLayer, first: int, used: int, shape: tuple[int, int]) -> None:
        super().__init__(sys.maxsize)
        self._layer, self._first, self._shape = layer, first, shape
        self.used = used

    def append(
        self,
        keys: Float[Tensor, "batch kv_heads new head_dim"],
        values: Float[Tensor, "batch kv_heads new v_dim"],
        columns: Int[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch kv_heads seen head_dim"], Float[Tensor, "batch kv_heads seen v_dim"]]:
        """Write the new columns of these rows; return all columns of them."""
        begin, end = self._first, self._first + len(keys)
        buffers = self._layer.fit(keys, values, *self._shape)
        first, self.used = self.used, self.used + keys.size(2)
        for buffer, added in zip(buffers, (keys, values), strict=True):
            if columns is None:
                buffer[begin:end, :, first : self.used] = added
            else:
                rows = torch.arange(begin, end, device=added.device)[:, None]
                buffer.transpose(1, 2)[rows, columns] = added.transpose(1, 2)
        held_keys, held_values = (buffer[begin:end, :, : self.used] for buffer in buffers)
        return held_keys, held_values


class SlotForward:
    """Rows of a model that are read and continued together, and that come and go one by one.

    A pass that raises leaves the rows before its own as they were; its own have to leave.

    Args:
        model: Passes `supports_slots`.
        max_rows: Most rows.
        max_bytes: Memory for keys and values, as far as `fits` is asked; ``None`` for any.
    """

    def __init__(self, model: Any, *, max_rows: int = 256, max_bytes: int | None = None) -> None:
        self._model, self._max_rows, self._max_bytes = model, max_rows, max_bytes
        self._device = model.head.weight.device
        self._layers = [_SlotLayer() for _ in model.make_cache(1, 1).layers]
        self._shape = (0, 0)
        self._extents: list[int] = []
        """Columns of each row that may have content, padding included."""
        self.lengths: list[int] = []
        """Tokens that each row has read."""

    @functools.cached_property
    def _token_bytes(self) -> int:
        """Memory of the keys and values of one token. Bytes."""
        cache = self._model.make_cache(1, 1)
        self._model.hidden(torch.zeros((1, 1), dtype=torch.int64, device=self._device), cache=cache)
        held = [tensor for layer in cache.layers for tensor in layer.held]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def _most_cells(self) -> int:
        """Most tokens that the memory has room for, over all rows."""
        return sys.maxsize if self._max_bytes is None else self._max_bytes // self._token_bytes

    @property
    def num_bytes(self) -> int:
        """Memory that keys and values take now. Bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers())

    def fits(self, rows: int, columns: int) -> bool:
        """Return whether the memory suffices for so many rows of that length.

        Args:
            rows: Rows.
            columns: Tokens of the longest of them.
        """
        return rows * _in_steps(columns) <= self._most_cells

    def read(self, first: int, ids: Sequence[Sequence[int]]) -> Float[Tensor, "rows new d_model"]:
        """Append tokens to neighbouring rows; return their hidden states, with padding on the right.

        Args:
            first: The first of the rows; rows beyond the last one are added.
            ids: New tokens of each row, at least one.
        """
        width = max(map(len, ids))
        self.lengths += [0] * (first - len(self.lengths))
        lengths = [*self.lengths, *[0] * len(ids)][first : first + len(ids)]
        # A row is padded with a token of its own: a mask hides padding, but NaN of another token would come through.
        padded = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in ids], device=self._device)
        hidden: Tensor = self._model.hidden(padded, cache=self._cache(first, lengths, width))
        self.lengths[first : first + len(ids)] = [held + len(new) for held, new in zip(lengths, ids, strict=True)]
        return hidden

    def logits(self, hidden: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
        """Return next-token logits.

        Args:
            hidden: From `read`.
        """
        return head_logits(self._model, hidden)

    def step(self, ids: Sequence[int]) -> Float[Tensor, "rows vocab"]:
        """Append one token to each of the first rows; return their next-token logits.

        Args:
            ids: One token for each of the rows.
        """
        return self.logits(self.read(0, [[token] for token in ids])[:, 0])

    def keep(self, order: Sequence[int]) -> None:
        """Keep some rows, in this order; the others leave.

        Args:
            order: Old place of each row; no row may move to a later place.
        """
        buffers, extents = list(self._buffers()), self._extents
        for place, row in enumerate(order):
            assert row >= place
            if row != place:
                for buffer in buffers:
                    buffer[place, :, : extents[row]] = buffer[row, :, : extents[row]]
                    buffer[place, :, extents[row] : extents[place]] = 0
                extents[place] = extents[row]
        for row in range(len(order), len(extents)):  # a later row would see what is left: a mask does not hide NaN
            for buffer in buffers:
                buffer[row, :, : extents[row]] = 0
        del extents[len(order) :]
        self.lengths = [self.lengths[row] for row in order]
        if not self.lengths:
            self.release()

    def release(self) -> None:
        """Let all rows leave, and give their memory back."""
        self._layers, self._shape = [_SlotLayer() for _ in self._layers], (0, 0)
        self.lengths.clear()
        self._extents.clear()

    def copy_block(self, row: int, first: int, end: int) -> Block:
        """Return a copy of the keys and values of some tokens.

        Args:
            row: The row.
            first: The first token.
            end: Behind the last token.
        """
        buffers = list(self._buffers())
        copies = [buffer[row, :, first:end].clone() for buffer in buffers]
        return list(zip(copies[::2], copies[1::2], strict=True))

    def restore(self, row: int, blocks: Sequence[Block]) -> None:
        """Begin a new row with tokens whose keys and values are known.

        Args:
            row: The row behind the last one.
            blocks: Neighbouring blocks from `copy_block`, from the first token on.
        """
        assert row == len(self.lengths)
        length = sum(block[0][0].size(1) for block in blocks)
        self._grow(row + 1, length)
        self._extents[row:] = [max([length, *self._extents[row:]])]
        for index, layer in enumerate(self._layers):
            keys, values = blocks[0][index]
            buffers = layer.fit(keys[None], values[None], *self._shape)
            for side, buffer in enumerate(buffers):
                torch.cat([block[index][side] for block in blocks], dim=1, out=buffer[row, :, :length])
        self.lengths.append(length)

    def _buffers(self) -> list[Tensor]:
        return [buffer for layer in self._layers for buffer in (layer.keys, layer.values) if buffer is not None]

    def _cache(self, first: int, lengths: list[int], new: int) -> KVCache:
        """Return neighbouring rows as the model appends to them."""
        longest, end = max(lengths), first + len(lengths)
        self._grow(end, longest + new)
        self._extents += [0] * (end - len(self._extents))
        self._extents[first:end] = [longest + new] * len(lengths)
        layers = [_RowsOfLayer(layer, first, longest, self._shape) for layer in self._layers]
        cache = KVCache(layers, batch_size=len(lengths), max_length=sys.maxsize)
        cache.length = longest
        cache.ends = None if min(lengths) == longest else torch.tensor(lengths, device=self._device)
        return cache

    def _grow(self, rows: int, columns: int) -> None:
        """Double the rows and add half of the columns if there are too few, or take as many as the memory allows."""
        held_rows, held_columns = self._shape
        if rows <= held_rows and columns <= held_columns:
            return
        more_rows = held_rows if rows <= held_rows else min(max(rows, 2 * held_rows), max(rows, self._max_rows))
        more_columns = held_columns if columns <= held_columns else _in_steps(max(columns, held_columns * 3 // 2))
        if more_rows * more_columns > self._most_cells:
            more_rows = max(rows, len(self.lengths))
            more_columns = _in_steps(max(columns, *self.lengths, 0))
        self._shape = (more_rows, more_columns)


def _in_steps(columns: int) -> int:
    return -(-columns // _COLUMNS) * _COLUMNS

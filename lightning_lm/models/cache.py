"""Keys and values of the tokens seen so far, so that a new token costs one column of work.

Prompts of different lengths are padded on the left: all rows end in the same column, and ``starts`` has the first real
one of each. Rows that were rewound by different counts (speculative decoding) end in columns of their own, in ``ends``.
A layer with a sliding window keeps the columns that can still be seen, and no more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.errors import ConfigurationError

__all__ = ["KVCache", "LayerCache", "LayerState", "right_aligned"]


def right_aligned(parts: Sequence[tuple[Tensor, Tensor]], batch_size: int, length: int) -> Tensor:
    """Return [batch, heads, length, size]: rows of different widths under each other, with zeros before them.

    Args:
        parts: Places in the batch, and the rows for them, which are equally wide: [rows, heads, columns, size].
        batch_size: Rows of the result.
        length: Columns of the result.
    """
    first = parts[0][1]
    whole = first.new_zeros((batch_size, first.size(1), length, first.size(3)))
    for rows, part in parts:
        whole[rows, :, length - part.size(2) :] = part
    return whole


class LayerState:
    """Base of what a layer keeps of earlier tokens, from which a `KVCache` is made."""

    @property
    def can_join(self) -> bool:
        """Return whether `join` is supported."""
        return False

    @property
    def can_rewind(self) -> bool:
        """Return whether any number of the newest columns can be forgotten."""
        return False

    def rewind(self, columns: int) -> None:
        """Forget the newest columns.

        Args:
            columns: Number of them.

        Raises:
            ConfigurationError: If the layer cannot go back.
        """
        raise ConfigurationError(
            f"{type(self).__name__} cannot go back {columns} column(s). Decode without speculation."
        )

    def rewind_rows(self, columns: Int[Tensor, "batch"], surplus: int) -> None:  # noqa: ARG002
        """Forget the newest columns of each row. Layers whose rows share columns drop those that no row has any more.

        Args:
            columns: Number of them in each row.
            surplus: Columns by which the longest row was longer before.
        """
        self.rewind(surplus)

    def keep_newest(self, columns: int) -> None:  # noqa: ARG002
        """Make sure that as many columns can be forgotten; layers that keep all columns need nothing for it.

        Args:
            columns: Most columns that a row will be rewound by.
        """
        return

    def align_right(self, padding: Int[Tensor, "batch"]) -> None:
        """Move the newest columns of each row, which are padding, in front of the others.

        Args:
            padding: Number of them in each row.

        Raises:
            ConfigurationError: If the layer cannot go back.
        """
        self.rewind_rows(padding, 0)

    def join(self, parts: Sequence[tuple[Tensor, Any]], batch_size: int, length: int) -> None:
        """Take what others hold for some of the rows each, aligned on the right; this one is empty so far.

        Args:
            parts: Places in the batch, and the state of the rows there.
            batch_size: Rows of this state.
            length: Columns that all rows have then.
        """
        raise NotImplementedError

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Keep these rows, in this order.

        Args:
            rows: Places of the rows.
        """
        raise NotImplementedError


class LayerCache(LayerState):
    """Keys and values of one layer, in a buffer that is taken when the first ones arrive.

    Args:
        max_length: Columns that will be asked for at most.
        window: Keys a query sees, itself included; ``None`` for all.
    """

    def __init__(self, max_length: int, window: int | None = None) -> None:
        self.keep = None if window is None or 2 * window >= max_length else window - 1
        self.capacity = max_length if self.keep is None else 2 * (self.keep + 1)
        self.used = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(
        self,
        keys: Float[Tensor, "batch kv_heads new head_dim"],
        values: Float[Tensor, "batch kv_heads new v_dim"],
        columns: Int[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch kv_heads seen head_dim"], Float[Tensor, "batch kv_heads seen v_dim"]]:
        """Add new columns and return all that are held.

        Args:
            keys: Keys of the new tokens.
            values: Values of the new tokens.
            columns: Places of the new tokens in each row; by default the same ones in all rows, behind all others.
        """
        if self.keys is None or self.values is None:
            self.keys, self.values = (
                new.new_empty((*new.shape[:2], self.capacity, new.size(3))) for new in (keys, values)
            )
        new, end = keys.size(2), self.used + keys.size(2)
        if end > self.capacity:
            return self._append_and_forget(keys, values)
        for memory, added in ((self.keys, keys), (self.values, values)):
            behind = memory.narrow(2, self.used, new)
            if columns is None:
                behind.copy_(added)
            else:  # a mask hides what no row has written, but not NaN
                behind.zero_()
                rows = torch.arange(len(added), device=added.device)[:, None]
                memory.transpose(1, 2)[rows, columns] = added.transpose(1, 2)
        self.used = end
        return self.held

    @property
    def held(
        self,
    ) -> tuple[Float[Tensor, "batch kv_heads held head_dim"], Float[Tensor, "batch kv_heads held v_dim"]]:
        """Keys and values of the columns that are held."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys.narrow(2, 0, self.used), self.values.narrow(2, 0, self.used)

    def _append_and_forget(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Move the columns that a window can still see to the front. Happens once per ``window`` new columns."""
        assert self.keep is not None
        assert self.keys is not None
        assert self.values is not None
        first = max(self.used - self.keep, 0)
        seen_keys = torch.cat((self.keys[:, :, first : self.used], keys), dim=2)
        seen_values = torch.cat((self.values[:, :, first : self.used], values), dim=2)
        self.used = min(self.keep, seen_keys.size(2))
        self.keys[:, :, : self.used] = seen_keys[:, :, seen_keys.size(2) - self.used :]
        self.values[:, :, : self.used] = seen_values[:, :, seen_values.size(2) - self.used :]
        return seen_keys, seen_values

    @property
    def can_join(self) -> bool:
        """Return whether `join` is supported."""
        return True

    @property
    def can_rewind(self) -> bool:
        """Return whether the layer keeps all columns."""
        return self.keep is None

    def rewind(self, columns: int) -> None:
        """Forget the newest columns.

        Raises:
            ConfigurationError: If this layer has dropped the older ones that a window would then need again.
        """
        if self.keep is not None:
            raise ConfigurationError(
                "A layer whose window is shorter than half the text keeps no more than it needs to go forward, so its "
                "cache cannot go back. Decode without speculation."
            )
        self.used -= columns

    def align_right(self, padding: Int[Tensor, "batch"]) -> None:
        """Move the newest columns of each row, which are padding, in front of the others.

        Args:
            padding: Number of them in each row.

        Raises:
            ConfigurationError: If this layer drops columns.
        """
        self.rewind(0)
        columns = torch.arange(self.used, device=padding.device)
        old = (columns - padding[:, None]) % self.used
        rows = torch.arange(len(padding), device=padding.device)[:, None]
        for held in self.held:
            held.copy_(held.transpose(1, 2)[rows, old].transpose(1, 2))

    def join(self, parts: Sequence[tuple[Tensor, "LayerCache"]], batch_size: int, length: int) -> None:
        """Take the columns that others hold for some of the rows each; see `KVCache.join`."""
        keys = right_aligned([(rows, part.held[0]) for rows, part in parts], batch_size, length)
        self.append(keys, right_aligned([(rows, part.held[1]) for rows, part in parts], batch_size, length))

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Keep these rows, in this order."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


class KVCache:
    """Keys and values of every layer, or other states, and the columns that each row has.

    Args:
        layers: The memory of each layer.
        batch_size: Rows.
        max_length: Columns that a row will have at most.
        starts: int64 [batch], the first real column of each row; columns before it are never seen. ``None`` where all
            rows begin in column 0.
    """

    def __init__(
        self, layers: Sequence[LayerState], *, batch_size: int, max_length: int, starts: Tensor | None = None
    ) -> None:
        if starts is not None and starts.shape != (batch_size,):
            raise ConfigurationError(f"starts needs one column per row: shape ({batch_size},), not {starts.shape}.")
        self.layers = list(layers)
        self.batch_size, self.max_length = batch_size, max_length
        self.length = 0
        """Columns of the longest row."""
        self.ends: Tensor | None = None
        """int64 [batch], the columns of each row; ``None`` where all have `length`."""
        self.starts = starts
        self.last_start = 0 if starts is None else int(starts.max())
        """From this column on every row is real. A plain number, so that no step has to wait for the device."""

    def reserve(self, batch_size: int, new: int) -> None:
        """Refuse columns that do not fit.

        Raises:
            ConfigurationError: If the cache has no room for ``new`` columns, or other rows.
        """
        if batch_size != self.batch_size:
            raise ConfigurationError(f"The cache holds {self.batch_size} rows, but {batch_size} came.")
        if self.length + new > self.max_length:
            raise ConfigurationError(
                f"The cache holds {self.length} of max_length={self.max_length} columns; {new} more do not fit. "
                "Make it with a larger max_length."
            )

    def advance(self, columns: int) -> None:
        """Count columns that all layers have added to all rows."""
        self.length += columns
        if self.ends is not None:
            self.ends = self.ends + columns

    def rewind(self, columns: int | Int[Tensor, "batch"]) -> None:
        """Forget the newest columns, as if they had never been read.

        Args:
            columns: Number of them, in all rows or in each; at most as many as were added since the longest prompt.

        Raises:
            ConfigurationError: If a sliding window has dropped columns that would be seen again.
        """
        if isinstance(columns, Tensor):
            self._end((self.length if self.ends is None else self.ends) - columns, columns)
        elif columns:
            for layer in self.layers:
                layer.rewind(columns)
            self.length -= columns
            self.ends = None if self.ends is None else self.ends - columns

    def keep_newest(self, columns: int) -> None:
        """Make sure that rows can be rewound by as many columns, also in layers that carry a state of constant size.

        Args:
            columns: Most columns of a row that will be forgotten at a time.
        """
        for layer in self.layers:
            layer.keep_newest(columns)

    def _end(self, ends: Int[Tensor, "batch"], forgotten: Int[Tensor, "batch"]) -> None:
        """Let each row end in a column of its own."""
        shortest, longest = (int(end) for end in ends.aminmax())
        if shortest < self.length:  # refused by layers that cannot go back, also if the longest row does not
            for layer in self.layers:
                layer.rewind_rows(forgotten, self.length - longest)
        self.length, self.ends = longest, None if shortest == longest else ends

    @property
    def can_join(self) -> bool:
        """Return whether `join` supports what the layers hold."""
        return all(layer.can_join for layer in self.layers)

    @property
    def can_rewind(self) -> bool:
        """Return whether no layer drops columns, so that any number of them can be forgotten."""
        return all(layer.can_rewind for layer in self.layers)

    def begin_with(self, prefix: "KVCache") -> None:
        """Let every row of this cache, which is empty so far, begin with the same tokens, in column 0.

        Args:
            prefix: A cache of one row that holds them.
        """
        self.starts, self.last_start = None, 0
        self.join([(torch.arange(self.batch_size), prefix)], prefix.length)

    def align_right(self, padding: Int[Tensor, "batch"]) -> None:
        """Let all rows end in the same column, and begin in one of their own.

        Args:
            padding: Newest columns of each row that are no tokens.

        Raises:
            ConfigurationError: If a layer drops columns.
        """
        for layer in self.layers:
            layer.align_right(padding)
        self.starts, self.last_start = padding, int(padding.max())

    def join(self, parts: Sequence[tuple[Tensor, "KVCache"]], length: int) -> None:
        """Take over what caches of fewer and narrower rows hold, aligned on the right; this one is empty so far.

        Args:
            parts: Caches, each with the places of its rows in this one; together they have all rows.
            length: Columns that all rows have then, with the padding.
        """
        self.reserve(sum(len(rows) for rows, _ in parts), length)
        for index, layer in enumerate(self.layers):
            layer.join([(rows, part.layers[index]) for rows, part in parts], self.batch_size, length)
        self.length = length

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Keep these rows, in this order; the others leave the batch."""
        self.batch_size = len(rows)
        if self.starts is not None:
            self.starts = self.starts[rows]
        for layer in self.layers:
            layer.select(rows)
        if self.ends is not None and len(rows):
            self._end(self.ends[rows], torch.zeros_like(rows))

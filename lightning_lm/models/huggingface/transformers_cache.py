"""The key-value cache of a model of ``transformers``, used as our own."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.cache import right_aligned

__all__ = ["TransformersCache"]


class TransformersCache:
    """The key-value cache of a `TransformersModel`: right-aligned rows, as in `lightning_lm.models.cache`.

    Args:
        past: A ``transformers`` cache.
        max_length: Most columns that may be written.
        starts: First valid column of each row, int64 [batch], where prompts are padded on the left.
    """

    def __init__(self, past: Any, max_length: int, starts: Int[Tensor, " batch"] | None = None) -> None:
        self.past = past
        self.max_length = max_length
        self.starts = starts
        self.length = 0
        """Columns written so far; recurrent layers of ``transformers`` do not count theirs."""

    def is_recurrent(self, *, some: bool) -> bool:
        """Return whether some layer has a recurrent state, or all of them have one and no keys and values.

        Args:
            some: Accept one such layer as enough.
        """
        if some:
            return any(hasattr(layer, "recurrent_states") for layer in self.past.layers)
        return all(hasattr(layer, "recurrent_states") and not hasattr(layer, "keys") for layer in self.past.layers)

    @property
    def can_join(self) -> bool:
        """Return whether `join` supports what the layers hold: keys and values, and no other states."""
        return {type(layer).__name__ for layer in self.past.layers} <= {"DynamicLayer", "DynamicSlidingWindowLayer"}

    @property
    def can_rewind(self) -> bool:
        """Return whether `rewind` supports what the layers hold: keys and values of all columns."""
        return {type(layer).__name__ for layer in self.past.layers} == {"DynamicLayer"}

    def join(self, parts: Sequence[tuple[Tensor, "TransformersCache"]], length: int) -> None:
        """Take over what caches of fewer and narrower rows hold, as `lightning_lm.models.cache.KVCache.join` does.

        Args:
            parts: Caches, each with the places of its rows in this one; together they have all rows.
            length: Columns that all rows have then, with the padding.
        """
        num_rows = sum(len(rows) for rows, _ in parts)
        for index, layer in enumerate(parts[0][1].past.layers):
            if layer.is_initialized:  # not where a layer uses the keys of another
                keys = [(rows, part.past.layers[index].keys) for rows, part in parts]
                values = [(rows, part.past.layers[index].values) for rows, part in parts]
                whole = right_aligned(keys, num_rows, length), right_aligned(values, num_rows, length)
                self.past.update(*whole, index)
        self.length = length

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows and drop the others."""
        for layer in self.past.layers:  # the second of these leaves recurrent states as they are
            (layer.reorder_cache if hasattr(layer, "recurrent_states") else layer.batch_select_indices)(rows)
        if self.starts is not None:
            self.starts = self.starts[rows]

    def rewind(self, columns: int | Int[Tensor, " batch"]) -> None:
        """Forget the newest columns, as `lightning_lm.models.cache.KVCache.rewind` does.

        Rows that are left with different lengths are aligned on the right again, which copies their keys and values.

        Args:
            columns: Number of them, in all rows or in each.

        Raises:
            ConfigurationError: If a layer has more than keys and values, or drops old ones.
        """
        kinds = {type(layer).__name__ for layer in self.past.layers} - {"DynamicLayer"}
        if kinds:
            raise ConfigurationError(
                f"A cache with {', '.join(sorted(kinds))} of transformers cannot go back, which speculation needs. "
                "Decode without."
            )
        layers = [layer for layer in self.past.layers if layer.is_initialized]
        if not layers:
            return
        device, rows = layers[0].keys.device, len(layers[0].keys)
        starts = torch.zeros(rows, dtype=torch.int64, device=device) if self.starts is None else self.starts
        lengths = self.length - starts - columns
        self.length = int(lengths.max())
        moved = self.length - lengths
        places = (torch.arange(self.length, device=device) + (starts - moved)[:, None]).clamp(min=0)[:, None, :, None]
        aligned = torch.equal(moved, starts)
        for layer in layers:
            layer.keys, layer.values = (
                held[:, :, : self.length]
                if aligned
                else held.gather(2, places.expand(-1, held.size(1), -1, held.size(3)))
                for held in (layer.keys, layer.values)
            )
        self.starts = moved if bool(moved.any()) else None

    def columns(self, width: int) -> tuple[Int[Tensor, "batch width"] | None, Bool[Tensor, "batch columns"] | None]:
        """Return positions and validity mask for the next columns, or nothing where all rows start at column 0."""
        total = self.length + width
        if total > self.max_length:
            raise ConfigurationError(
                f"The cache holds {self.max_length} columns and {total} are needed; make it with max_length={total}."
            )
        if self.starts is None:
            return None, None
        offsets = torch.arange(total, device=self.starts.device) - self.starts[:, None]
        return offsets[:, self.length :].clamp(min=0), offsets >= 0

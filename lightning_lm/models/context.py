"""Per-token context of one forward pass: made once, read by every layer."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.attention import Documents, PairBias
from lightning_lm.models.auxiliary import LayerLoad, collected
from lightning_lm.models.cache import KVCache
from lightning_lm.models.positions import Rope

__all__ = ["Context", "make_context"]


@dataclass(eq=False, kw_only=True)
class Context:
    """Places of the tokens of one forward pass.

    Positions are counted from the beginning of a row, a document or a prompt; columns are places in the row.
    """

    positions: slice | Tensor
    """A slice where all rows stand at the same positions, else int64 [batch, seq]."""
    num_positions: int
    """All positions are below this number."""
    documents: Documents | None = None
    """Documents of packed rows; ``None`` if each row is one."""
    cache: KVCache | None = None
    """Keys and values of earlier tokens."""
    input_ids: Tensor | None = None
    """Tokens, int64 [batch, seq], for layers that look at them; ``None`` where a layer runs without its model."""
    new: int = 0
    """Columns of this pass."""
    columns: Tensor | None = None
    """Columns of the tokens in the cache, int64 [batch, seq]; ``None`` where they are the same in all rows."""
    bias: PairBias | None = None
    """Bias of each score of self-attention by the distance of the two tokens, shared by all layers."""
    target_ids: Tensor | None = None
    """Index of the target that each token belongs to, int64 [batch, seq]; ``None`` for one target per row."""
    memory: Any = None
    """Encoded sources for cross-attention, a `models.cross_attention.Memory`."""
    token_type_ids: Tensor | None = None
    """Segments of the tokens, int64 [batch, seq]; ``None`` for the first everywhere."""
    rotations: dict[tuple[Rope, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Cosines and sines at the positions, for each kind of rotary embedding in the model."""
    counted: Bool[Tensor, "batch seq"] | None = None
    """Tokens that count for auxiliary losses and loads of experts; ``None`` for all."""
    auxiliary: list[LayerLoad] | None = field(default_factory=collected.get)
    """Reports of layers in a training step beside their output; ``None`` where nobody asks."""
    before_last: Tensor | None = None
    """Residual stream before the last layer, [batch, seq, d_model], once that has been run."""
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def mask(self, num_keys: int, window: int | None) -> Documents | Bool[Tensor, "#batch 1 queries keys"] | None:
        """Return what confines the queries of a layer beyond causality and its window.

        Args:
            num_keys: Keys the layer holds; they end with this pass's columns.
            window: The layer's sliding window.
        """
        if self.cache is None or self.documents is not None:
            return self.documents
        first = self.cache.length + self.new - num_keys
        if self.new == 1 and window is not None:
            first = max(first, self.cache.length + 1 - window)
        if self.columns is None and (self.cache.starts is None or first >= self.cache.last_start):
            return None
        if (window, num_keys) not in self._masks:
            self._masks[window, num_keys] = self._row_mask(self.cache, num_keys, window)
        return self._masks[window, num_keys]

    def sequence_index(self) -> Int[Tensor, " tokens"]:
        """Return the number of each token's document, counted over all rows laid end to end."""
        if self.documents is not None:
            return (self.documents.positions() == 0).flatten().cumsum(0) - 1
        assert self.input_ids is not None
        rows = torch.arange(len(self.input_ids), device=self.input_ids.device)
        return rows[:, None].expand_as(self.input_ids).flatten()

    def _row_mask(self, cache: KVCache, num_keys: int, window: int | None) -> Bool[Tensor, "batch 1 queries keys"]:
        """Hide what lies outside of a row. A query in its padding sees itself, so that its softmax is not 0 / 0."""
        device = (cache.starts if self.columns is None else self.columns).device  # type: ignore[union-attr]
        keys = torch.arange(num_keys, device=device) + (cache.length + self.new - num_keys)
        distance = (keys[-self.new :] if self.columns is None else self.columns)[..., None] - keys
        visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        if cache.starts is not None:
            visible = visible & ((keys >= cache.starts[:, None])[:, None] | (distance == 0))
        return visible.unsqueeze(1)


def make_context(
    input_ids: Tensor,
    position_ids: Tensor | None,
    document_ids: Tensor | Documents | None,
    cache: KVCache | None,
    prefix_lengths: Tensor | None = None,
) -> Context:
    """Return the context of a forward pass: positions, documents and cache of its tokens.

    Args:
        input_ids: Any tensor of the shape of the tokens, [batch, seq].
        position_ids: Positions of the tokens, int64 [batch, seq]; by default counted from the start of a document.
        document_ids: Ids of the documents of packed rows, int64 [batch, seq], or these as they are known already; by
            default each row is one.
        cache: Keys and values of earlier tokens.
        prefix_lengths: Tokens at the start of each row, int64 [batch], or of each token's document, [batch, seq], that
            see each other in both directions; by default none.

    Raises:
        ConfigurationError: If packed documents are combined with a cache, the cache is full, or a prefix does not fit.
    """
    batch, new = input_ids.shape
    documents = _documents(input_ids, document_ids, cache, prefix_lengths)
    if cache is not None:
        cache.reserve(batch, new)
    first = 0 if cache is None else cache.length
    positions: slice | Tensor = slice(first, first + new)
    num_positions = first + new
    columns = None
    if cache is not None and cache.ends is not None:
        columns = torch.arange(new, device=input_ids.device) + cache.ends[:, None]
    if position_ids is not None:
        positions = position_ids
        if position_ids.device.type == "cpu":
            num_positions = int(position_ids.max()) + 1
    elif columns is not None and cache is not None:
        positions = columns if cache.starts is None else columns - cache.starts[:, None]
    elif cache is not None and cache.starts is not None:
        shared = torch.arange(first, first + new, device=input_ids.device)
        positions = (shared - cache.starts[:, None]).clamp(min=0)
        if first == 0 and new > 1 and documents is None:
            documents = Documents.from_ids((shared >= cache.starts[:, None]).long())
    elif documents is not None:
        positions = documents.positions()
    return Context(
        positions=positions,
        num_positions=num_positions,
        documents=documents,
        cache=cache,
        input_ids=None if input_ids.is_floating_point() else input_ids,
        new=new,
        columns=columns,
    )


def _documents(
    input_ids: Tensor, document_ids: Tensor | Documents | None, cache: KVCache | None, prefix_lengths: Tensor | None
) -> Documents | None:
    """Return the documents of a pass with their prefixes; a padded prompt with a prefix is a document of its own."""
    if cache is not None and document_ids is not None:
        raise ConfigurationError("Packed documents cannot be cached: give each its own row, padded on the left.")
    if prefix_lengths is None:
        return Documents.from_ids(document_ids) if isinstance(document_ids, Tensor) else document_ids
    if isinstance(document_ids, Documents):
        raise ConfigurationError("Documents are given with their prefixes already; leave prefix_lengths out.")
    if cache is not None and cache.length:
        raise ConfigurationError("Only a prompt can be a prefix, before anything else is in the cache.")
    ids, lengths = torch.zeros_like(input_ids) if document_ids is None else document_ids, prefix_lengths
    if lengths.shape == input_ids.shape[:1]:
        lengths = lengths[:, None].expand(input_ids.shape[0], input_ids.shape[1])
    _check_prefixes(lengths, prefix_lengths, input_ids)
    if cache is not None and cache.starts is not None:
        ids = (torch.arange(input_ids.size(1), device=ids.device) >= cache.starts[:, None]).long()
        lengths = lengths * ids
    return Documents.from_ids(ids, lengths)


def _check_prefixes(lengths: Tensor, given: Tensor, input_ids: Tensor) -> None:
    batch, seq = input_ids.shape
    if lengths.shape != input_ids.shape:
        raise ConfigurationError(
            f"prefix_lengths has shape {tuple(given.shape)}; needed is one number per row, ({batch},), or per token, "
            f"({batch}, {seq})."
        )
    if lengths.device.type == "cpu" and lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= seq:
        raise ConfigurationError(
            f"prefix_lengths reach from {int(lengths.min())} to {int(lengths.max())}, and the row has {seq} tokens. "
            f"Give numbers from 0 to {seq}, or longer rows (context_length)."
        )

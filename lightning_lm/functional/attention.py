"""Causal self-attention: one function that takes the cheapest exact way for the device and the shape.

``causal_attention`` scores few pairs of tokens that it could leave out. Documents packed into one row are attended one
by one instead of under a mask; a sliding window is cut into blocks of queries with their own span of keys; a single
new query over cached keys needs no mask at all. Every way gives the same numbers as the textbook formula.
"""

import math
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_lm.errors import ConfigurationError

__all__ = ["Documents", "SharedPrefixes", "causal_attention", "first_visible", "require_heads"]

_BLOCK = 128
"""Queries of a sliding window that are attended together on a CPU, whose caches then hold all they need."""


class SharedPrefixes(NamedTuple):
    """Earlier tokens that documents continue: their keys and values are seen again instead of computed again."""

    lengths: tuple[int, ...]
    """Tokens before each document of a run, one number per run; 0 if it continues nothing."""
    tokens: Int[Tensor, " prefix_tokens"]
    """Their places in the rows laid end to end, document after document."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Boundaries of the documents in packed rows. Made once per batch and read by every layer."""

    ids: Int[Tensor, "batch seq"]
    """Equal inside a document, different in neighbouring ones."""
    runs: tuple[tuple[int, int], ...]
    """(count, length) of documents of equal length that follow each other, rows laid end to end; empty off the CPU."""
    prefixes: SharedPrefixes | None = None
    """Tokens of other documents that documents continue; ``None`` if none does. On a CPU only."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _first: dict[int | None, Tensor] = field(default_factory=dict)

    @classmethod
    def from_ids(cls, document_ids: Int[Tensor, "batch seq"]) -> "Documents | None":
        """Find the documents, or return ``None`` where each row is a single one and plain causal attention is right.

        Off the CPU nothing is read back from the device, so ``None`` is never returned there.
        """
        if document_ids.device.type != "cpu":
            documents = cls(ids=document_ids, runs=())
            documents.first_keys()  # here, so that layers which are compiled one by one all find it
            return documents
        seq = document_ids.size(1)
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        torch.ne(document_ids[:, 1:], document_ids[:, :-1], out=starts[:, 1:])
        places = [*starts.flatten().nonzero().flatten().tolist(), starts.numel()]
        lengths = (end - start for start, end in pairwise(places))
        runs = tuple((len(list(group)), length) for length, group in groupby(lengths))
        return None if runs == ((document_ids.size(0), seq),) else cls(ids=document_ids, runs=runs)

    def mask(self, window: int | None = None) -> Bool[Tensor, "batch 1 seq seq"]:
        """Return which keys each query may see: earlier ones of its own document (within the window)."""
        if window not in self._masks:
            causal = band(self.ids.size(1), self.ids.size(1), window, device=self.ids.device)
            self._masks[window] = (causal & (self.ids[:, :, None] == self.ids[:, None, :])).unsqueeze(1)
        return self._masks[window]

    def first_keys(self, window: int | None = None) -> Int[Tensor, "batch seq"]:
        """Return the first key that each query may see: the same mask, as one number per query."""
        if window not in self._first:
            columns = torch.arange(self.ids.size(1), device=self.ids.device)
            self._first[window] = first_visible(columns - self.positions(), window).int()
        return self._first[window]

    def positions(self) -> Int[Tensor, "batch seq"]:
        """Return the place of each token in its document, from 0."""
        columns = torch.arange(self.ids.size(1), device=self.ids.device).expand_as(self.ids)
        begins = torch.zeros_like(self.ids)
        begins[:, 1:] = torch.where(self.ids[:, 1:] != self.ids[:, :-1], columns[:, 1:], 0)
        return columns - begins.cummax(dim=1).values


def first_visible(document_starts: Int[Tensor, "batch seq"], window: int | None = None) -> Int[Tensor, "batch seq"]:
    """Return the first key that each query sees: the start of its document, or of its window if that is later.

    Args:
        document_starts: Column where the document of each token begins; zeros where a row is a single one.
        window: Keys a query sees, itself included; ``None`` for all.
    """
    if window is None:
        return document_starts
    columns = torch.arange(document_starts.size(1), device=document_starts.device, dtype=document_starts.dtype)
    return torch.maximum(document_starts, columns - (window - 1))


def band(queries: int, keys: int, window: int | None, *, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """Return which keys each query may see, where the queries are the last of the keys."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def require_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse tensors whose axes would be taken for others.

    Args:
        query: Must be [batch, heads, queries, head_dim].
        key: Must be [batch, kv_heads, keys, head_dim].
        value: Like ``key``.

    Raises:
        ConfigurationError: If a tensor has not four axes.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            heads, columns = ("heads", "queries") if name == "query" else ("kv_heads", "keys")
            raise ConfigurationError(
                f"{name} has shape {tuple(tensor.shape)}, and attention needs [batch, {heads}, {columns}, head_dim]. "
                "Of a single head make tensor.unsqueeze(1)."
            )


def causal_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    *,
    mask: Documents | Bool[Tensor, "#batch 1 queries keys"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Attend from each query to the keys up to its own place.

    The queries are the last of the keys, so that keys of earlier calls (a cache) may stand before them.

    Args:
        query: ``heads`` is a multiple of ``kv_heads``; each key head serves a group of neighbouring query heads.
        key: One per column seen so far.
        value: Like ``key``.
        mask: `Documents` confines each query to its own document. A boolean tensor decides everything: True is seen,
            and ``window`` is not looked at.
        window: Number of keys a query sees, itself included; ``None`` for all.
        softcap: Scores are squeezed to ``softcap * tanh(score / softcap)``.
        scale: Multiplies the scores; ``None`` for ``1 / sqrt(head_dim)``.
        dropout: Probability with which a weight is dropped. Zero outside training.

    Raises:
        ConfigurationError: If a tensor has other axes, or there are more queries than keys and no mask of pairs.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023, arXiv:2305.13245; soft cap: Gemma 2,
        arXiv:2408.00118, section 2.
    """
    require_heads(query, key, value)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and (query.requires_grad or query.size(2) > 1):
        # The CPU kernel's backward takes six times as long in bfloat16 as in float32, and forward as long. Without a
        # gradient too: what a reference scores must not differ by rounding from what the policy does.
        wide = (x.float() for x in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            mixed = causal_attention(*wide, mask=mask, window=window, softcap=softcap, scale=scale, dropout=dropout)
        return mixed.to(query.dtype)
    options = _Options(softcap, query.size(-1) ** -0.5 if scale is None else scale, dropout)
    if isinstance(mask, Documents):
        if mask.runs:
            return _per_document(query, key, value, mask, window, options)
        mask = mask.mask(window)
    if mask is not None:
        return _attend(query, key, value, options, mask=mask)
    return _causal(query, key, value, window, options)


@dataclass(frozen=True)
class _Options:
    softcap: float | None
    scale: float
    dropout: float


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int | None, options: _Options) -> Tensor:
    queries, keys = query.size(2), key.size(2)
    if queries > keys:
        raise ConfigurationError(
            f"There are {queries} queries and {keys} keys, and the queries are the last of the keys. The "
            "axes are [batch, heads, seq, head_dim]: transpose(1, 2) if heads come after seq."
        )
    if queries == 1:  # the newest token sees all it is given
        if window is not None and keys > window:
            key, value = key[:, :, -window:], value[:, :, -window:]
        return _attend(query, key, value, options)
    if queries == keys and (window is None or window >= keys):
        return _attend(query, key, value, options, causal=True)
    if queries == keys and window is not None:
        return _banded(query, key, value, window, options)
    return _attend(query, key, value, options, mask=band(queries, keys, window, device=query.device))


def _per_document(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None, options: _Options
) -> Tensor:
    """Attend inside each document and to the prefix that it continues, without a mask of all pairs.

    Rows laid end to end are a list of documents; neighbours of equal length form a batch. Splitting gives views, and
    its backward is one concatenation. All prefixes are gathered at once for the same reason.
    """
    batch, runs, prefixes = query.size(0), documents.runs, documents.prefixes
    before = (0,) * len(runs) if prefixes is None else prefixes.lengths
    laid = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    own = [x.split([count * length for count, length in runs]) for x in laid]
    if prefixes is not None:
        sizes = [count * length for (count, _), length in zip(runs, before, strict=True)]
        earlier = [x.index_select(0, prefixes.tokens).split(sizes) for x in laid[1:]]
    out = []
    for index, ((count, length), prefix) in enumerate(zip(runs, before, strict=True)):
        q, k, v = (x[index].unflatten(0, (count, length)) for x in own)
        if prefix:
            shared = (x[index].unflatten(0, (count, prefix)) for x in earlier)
            k, v = (torch.cat(pair, dim=1) for pair in zip(shared, (k, v), strict=True))
        mixed = _causal(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window, options)
        out.append(mixed.transpose(1, 2).flatten(0, 1))
    return torch.cat(out).view(batch, -1, *query.shape[1::2]).transpose(1, 2)


# Lengths differ from batch to batch, so a compiler must not specialise on them. `torch.compiler.disable` sets this very
# attribute, but loads the whole compiler first, which takes longer than everything else that this package imports.
_per_document._torchdynamo_disable = True  # type: ignore[attr-defined]


def _banded(query: Tensor, key: Tensor, value: Tensor, window: int, options: _Options) -> Tensor:
    """Attend within a sliding window in time linear in the length, one block of queries after the other.

    A block sees its own keys and those of the blocks that its first query reaches back to. Keys are cut once into
    pieces that the spans share, so that the backward adds pieces and never fills whole lengths with zeros.
    """
    block = _BLOCK if query.device.type == "cpu" else max(window, _BLOCK)
    reach = -(-(window - 1) // block)
    pieces = [x.split(block, dim=2) for x in (query, key, value)]
    masks: dict[tuple[int, int], Tensor] = {}
    out = []
    for index, q in enumerate(pieces[0]):
        first = max(index - reach, 0)
        k, v = (torch.cat(x[first : index + 1], dim=2) for x in pieces[1:])
        shape = (q.size(2), k.size(2))
        if shape not in masks:
            masks[shape] = band(*shape, window, device=query.device)
        out.append(_attend(q, k, v, options, mask=masks[shape]))
    return torch.cat(out, dim=2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, options: _Options, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Weigh the values by the softmax of the scores, in one kernel where there is no soft cap."""
    grouped = query.size(1) != key.size(1)
    # On GPUs no kernel takes both groups and a mask, and torch would fall back to one that holds all scores.
    if grouped and (options.softcap is not None or (mask is not None and query.device.type != "cpu")):
        key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
        grouped = False
    if options.softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, options.dropout, causal, scale=options.scale, enable_gqa=grouped
        )
    if causal:
        mask = band(query.size(2), key.size(2), None, device=query.device)
    scores = (query * options.scale) @ key.transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = F.dropout(scores.softmax(dim=-1), options.dropout).to(value.dtype)
    return weights @ value

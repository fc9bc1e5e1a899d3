"""Self-attention: functions that take the cheapest exact way for the device and the shape.

``causal_attention`` scores few pairs of tokens that it could leave out. Documents packed into one row are attended one
by one instead of under a mask; a sliding window is cut into blocks of queries with their own span of keys; a single
new query over cached keys needs no mask at all. The first tokens of a document may see each other in both directions
(a prefix language model). ``bidirectional_attention`` lets every token see those after it too. Every way gives the same
numbers as the textbook formula.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.documents import Documents, SharedPrefixes, band, distances, first_visible

__all__ = [
    "Documents",
    "PairBias",
    "SharedPrefixes",
    "biased_attention",
    "bidirectional_attention",
    "causal_attention",
    "first_visible",
    "require_heads",
]

PairBias = Callable[[Tensor], Tensor]
"""A bias of the scores by distance: int64 [*, queries, keys], how far each key lies before its query, to
[*, heads, queries, keys]."""

_BLOCK = 128
"""Queries of a sliding window that are attended together on a CPU, whose caches then hold all they need."""


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
    value: Float[Tensor, "batch kv_heads keys v_dim"],
    *,
    mask: Documents | Bool[Tensor, "#batch 1 queries keys"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads queries v_dim"]:
    """Attend from each query to the keys up to its own place.

    The queries are the last of the keys, so that keys of earlier calls (a cache) may stand before them.

    Args:
        query: ``heads`` is a multiple of ``kv_heads``; each key head serves a group of neighbouring query heads.
        key: One per column seen so far.
        value: One per key; its features may be of another number.
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
    if _is_slow(query):
        wide = (x.float() for x in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            mixed = causal_attention(*wide, mask=mask, window=window, softcap=softcap, scale=scale, dropout=dropout)
        return mixed.to(query.dtype)
    options = _Options(softcap, query.size(-1) ** -0.5 if scale is None else scale, dropout)

    def attend(q: Tensor, k: Tensor, v: Tensor, prefix: int = 0) -> Tensor:
        if prefix > 1:
            return _prefixed(q, k, v, window, options, prefix=prefix)
        return _causal(q, k, v, window, options)

    if isinstance(mask, Documents):
        if mask.runs:
            return _per_document(query, key, value, mask, attend)
        mask = mask.mask(window)
    return attend(query, key, value) if mask is None else _attend(query, key, value, options, mask=mask)


def bidirectional_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    *,
    mask: Documents | Bool[Tensor, "#batch 1 #queries keys"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Attend from each query to keys on both sides, those of its own document.

    Args:
        query: ``heads`` is a multiple of ``kv_heads``; each key head serves a group of neighbouring query heads.
        key: One per query; without documents and a window any number (cross-attention).
        value: Like ``key``.
        mask: `Documents` confines each query to its own document. A boolean tensor decides everything.
        window: Keys at this distance and beyond, on either side, are not seen; ``None`` for all.
        softcap: Scores are squeezed to ``softcap * tanh(score / softcap)``.
        scale: Multiplies the scores; ``None`` for ``1 / sqrt(head_dim)``.
        dropout: Probability with which a weight is dropped. Zero outside training.

    Raises:
        ConfigurationError: If a tensor has other axes.

    Source:
        Devlin et al. 2019, arXiv:1810.04805; symmetric window: Beltagy et al. 2020, arXiv:2004.05150.
    """
    require_heads(query, key, value)
    if _is_slow(query):
        wide = (x.float() for x in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            mixed = bidirectional_attention(
                *wide, mask=mask, window=window, softcap=softcap, scale=scale, dropout=dropout
            )
        return mixed.to(query.dtype)
    options = _Options(softcap, query.size(-1) ** -0.5 if scale is None else scale, dropout)

    def attend(q: Tensor, k: Tensor, v: Tensor, _: int = 0) -> Tensor:
        return _two_way(q, k, v, window, options)

    if isinstance(mask, Documents):
        if mask.runs:
            return _per_document(query, key, value, mask, attend)
        mask = mask.mask(window, causal=False)
    return attend(query, key, value) if mask is None else _attend(query, key, value, options, mask=mask)


def biased_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    bias: PairBias,
    *,
    causal: bool = True,
    mask: Documents | Bool[Tensor, "#batch 1 queries keys"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Attend as `causal_attention` or `bidirectional_attention` does, with a bias of the scores by distance.

    Args:
        query: ``heads`` is a multiple of ``kv_heads``; each key head serves a group of neighbouring query heads.
        key: As in `causal_attention`; one per query in both directions.
        value: Like ``key``.
        bias: Added to the scores.
        causal: Queries see no later keys.
        mask: `Documents` confines each query to its own document. A boolean tensor decides everything.
        scale: Multiplies the scores before the bias is added; ``None`` for ``1 / sqrt(head_dim)``.
        dropout: Probability with which a weight is dropped. Zero outside training.

    Source:
        Raffel et al. 2020, arXiv:1910.10683, section 2.1; Press et al. 2022, arXiv:2108.12409.
    """
    require_heads(query, key, value)
    if _is_slow(query):
        q, k, v = query.float(), key.float(), value.float()
        with torch.autocast("cpu", enabled=False):
            mixed = biased_attention(q, k, v, bias, causal=causal, mask=mask, scale=scale, dropout=dropout)
        return mixed.to(query.dtype)
    options = _Options(None, query.size(-1) ** -0.5 if scale is None else scale, dropout, bias)

    def attend(q: Tensor, k: Tensor, v: Tensor, prefix: int = 0) -> Tensor:
        if prefix > 1 and causal:
            distance = distances(q.size(2), q.size(2), device=q.device)
            two_way = torch.arange(q.size(2), device=q.device) < prefix
            return _attend(q, k, v, options, mask=(distance >= 0) | two_way)
        return _causal(q, k, v, None, options) if causal else _attend(q, k, v, options)

    if isinstance(mask, Documents):
        if mask.runs:
            return _per_document(query, key, value, mask, attend)
        mask = mask.mask(causal=causal)
    return attend(query, key, value) if mask is None else _attend(query, key, value, options, mask=mask)


def _is_slow(query: Tensor) -> bool:
    """Return whether attention is computed in float32 instead.

    The CPU kernel's backward takes six times as long in bfloat16 as in float32, and forward as long. Without a gradient
    too: what a reference scores must not differ by rounding from what the policy does.
    """
    return bool(query.device.type == "cpu" and query.dtype == torch.bfloat16) and (
        query.requires_grad or query.size(2) > 1
    )


@dataclass(frozen=True)
class _Options:
    softcap: float | None
    scale: float
    dropout: float
    bias: PairBias | None = None


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


def _prefixed(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, options: _Options, *, prefix: int
) -> Tensor:
    """Attend causally, but among the first ``prefix`` tokens of these documents in both directions."""
    if window is not None and window < query.size(2):
        distance = distances(query.size(2), query.size(2), device=query.device)
        two_way = torch.arange(query.size(2), device=query.device) < prefix
        return _attend(query, key, value, options, mask=((distance >= 0) | two_way) & (distance.abs() < window))
    both = _attend(query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], options)
    if prefix == query.size(2):
        return both
    return torch.cat((both, _causal(query[:, :, prefix:], key, value, None, options)), dim=2)


def _two_way(query: Tensor, key: Tensor, value: Tensor, window: int | None, options: _Options) -> Tensor:
    """Attend to all keys, or to those within the window: one block of queries after the other."""
    seq = query.size(2)
    if window is None or window >= seq:
        return _attend(query, key, value, options)
    out = []
    for start in range(0, seq, block := max(_BLOCK, window)):
        first, last = max(start - window + 1, 0), min(start + block + window - 1, seq)
        q = query[:, :, start : start + block]
        places = torch.arange(start, start + q.size(2), device=query.device)
        near = (places[:, None] - torch.arange(first, last, device=query.device)).abs() < window
        out.append(_attend(q, key[:, :, first:last], value[:, :, first:last], options, mask=near))
    return torch.cat(out, dim=2)


def _per_document(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, attend: Callable[..., Tensor]
) -> Tensor:
    """Attend inside each document and to the prefix that it continues, without a mask of all pairs.

    Rows laid end to end are a list of documents; neighbours of equal length form a batch. Splitting gives views, and
    its backward is one concatenation. All prefixes are gathered at once for the same reason.
    """
    batch, runs, prefixes = query.size(0), documents.runs, documents.prefixes
    before = (0,) * len(runs) if prefixes is None else prefixes.lengths
    two_way = documents.run_prefixes or (0,) * len(runs)
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
        mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), two_way[index])
        out.append(mixed.transpose(1, 2).flatten(0, 1))
    return torch.cat(out).view(batch, -1, query.size(1), value.size(3)).transpose(1, 2)


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
    bias = _bias(query, key, options)
    # On GPUs no kernel takes both groups and a mask, and torch would fall back to one that holds all scores.
    masked = (mask is not None or bias is not None) and query.device.type != "cpu"
    if grouped and (options.softcap is not None or masked):
        key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
        grouped = False
    if causal and (options.softcap is not None or bias is not None):
        mask, causal = band(query.size(2), key.size(2), None, device=query.device), False
    if options.softcap is None:
        if bias is not None:
            mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
        return F.scaled_dot_product_attention(
            query, key, value, mask, options.dropout, causal, scale=options.scale, enable_gqa=grouped
        )
    scores = (query * options.scale) @ key.transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = F.dropout(scores.softmax(dim=-1), options.dropout).to(value.dtype)
    return weights @ value


def _bias(query: Tensor, key: Tensor, options: _Options) -> Tensor | None:
    """Return the bias of all scores, [1, heads, queries, keys], where the queries are the last of the keys."""
    if options.bias is None:
        return None
    bias = options.bias(distances(query.size(2), key.size(2), device=query.device))
    return bias.to(query.dtype).expand(query.size(0), *bias.shape[-3:])

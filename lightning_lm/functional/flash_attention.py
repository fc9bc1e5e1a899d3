"""FlashAttention-2 in plain torch: exact attention that never holds all scores, to be read beside the Triton kernels.

Scores are made one tile at a time, (queries x keys), and forgotten. What makes that exact is the online softmax: with
the largest score ``m`` and the sum ``l`` of ``exp(score - m)`` so far, a new tile only rescales what is there. The
backward makes each tile again from the one number per query that was kept, ``lse = m + log l``.

One mask says it all: a query sees the keys from its own first one up to its own place. Packed documents, windows
and both at once are such intervals, and a tile outside of the intervals of its queries is never made.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.functional.attention import require_heads

__all__ = ["FlashOptions", "flash_attention", "flash_backward", "flash_forward"]


@dataclass(frozen=True, kw_only=True)
class FlashOptions:
    """Settings of the attention scores and of the tiling.

    Args:
        scale: Multiplies the scores.
        softcap: Scores are squeezed to ``softcap * tanh(score / softcap)``.
        block: Queries, and keys, of a tile.
    """

    scale: float
    softcap: float | None = None
    block: int = 64


def flash_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    *,
    first: Int[Tensor, "#batch queries"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    block: int = 64,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Attend from each query to the keys between its first one and its own place.

    For reading and for checking: `lightning_lm.functional.attention.causal_attention` is what models call.

    Args:
        query: The last of the keys; ``heads`` is a multiple of ``kv_heads``.
        key: One per column seen so far.
        value: Like ``key``.
        first: First key that each query sees, see `first_visible`; ``None`` for the very first. A query whose interval
            is empty gets zeros.
        softcap: Scores are squeezed to ``softcap * tanh(score / softcap)``.
        scale: Multiplies the scores; ``None`` for ``1 / sqrt(head_dim)``.
        block: Queries, and keys, of a tile.

    Source:
        Dao 2023, arXiv:2307.08691, algorithms 1 and 2; online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    require_heads(query, key, value)
    options = FlashOptions(scale=query.size(-1) ** -0.5 if scale is None else scale, softcap=softcap, block=block)
    return cast(Tensor, _Flash.apply(query, key, value, first, options))  # type: ignore[no-untyped-call]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, options: FlashOptions
    ) -> Tensor:
        out, lse = flash_forward(query, key, value, first, options)
        ctx.save_for_backward(query, key, value, first, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, first, out, lse = ctx.saved_tensors
        return *flash_backward(gradient, query, key, value, (first, out, lse), ctx.options), None, None


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, options: FlashOptions
) -> tuple[Tensor, Tensor]:
    """Return the output, and per query the logarithm of the sum of its exponentiated scores.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, keys, head_dim].
        value: Like ``key``.
        first: First key that each query sees, [batch, queries].
        options: Scale, soft cap, size of a tile.
    """
    queries, keys, values = _grouped(query, key), key.unsqueeze(2), value.unsqueeze(2)
    out, lse = torch.zeros_like(queries), _statistics(queries)
    for tile in _tiles(query, key, first, options.block):
        q, largest = queries[..., tile.rows, :], _statistics(queries[..., tile.rows, :]).fill_(-torch.inf)
        total, weighted = torch.zeros_like(largest), torch.zeros_like(q, dtype=largest.dtype)
        for columns in tile.columns:
            scores, _ = _scores(q, keys[..., columns, :], tile.hidden(columns), options)
            previous, largest = largest, torch.maximum(largest, scores.amax(dim=-1))
            pivot = largest.where(largest > -torch.inf, 0)  # a query that has seen nothing yet
            weights = torch.exp(scores - pivot[..., None])
            shrink = torch.exp(previous - pivot)
            total = shrink * total + weights.sum(dim=-1)
            weighted = shrink[..., None] * weighted + _product(weights.to(value.dtype), values[..., columns, :])
        out[..., tile.rows, :] = (weighted / total.where(total > 0, 1)[..., None]).to(out.dtype)
        # Against a lse of infinity every weight is zero, in the backward too.
        lse[..., tile.rows] = torch.where(total > 0, largest + total.log(), torch.inf)
    return out.view_as(query), lse.flatten(1, 2)


def flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: tuple[Tensor | None, Tensor, Tensor],
    options: FlashOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values.

    With weights ``P = exp(S - lse)``: ``dV = P' dO``, ``dP = dO V'``, ``dS = P (dP - rowsum(dO O))``, ``dQ = dS K`` and
    ``dK = dS' Q``, summed over tiles.

    Args:
        gradient: Gradient of the output.
        query: As in forward.
        key: As in forward.
        value: As in forward.
        kept: ``first``, the output and ``lse`` of forward.
        options: As in forward.
    """
    first, out, lse = kept
    queries, keys, values = _grouped(query, key), key.unsqueeze(2), value.unsqueeze(2)
    upstream, lse = _grouped(gradient, key), lse.view(queries.shape[:-1])
    along = (upstream.to(lse.dtype) * _grouped(out, key)).sum(dim=-1)
    grad_query, grad_key, grad_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (queries, keys, values))
    for tile in _tiles(query, key, first, options.block):
        q, g = queries[..., tile.rows, :], upstream[..., tile.rows, :]
        for columns in tile.columns:
            k, v = keys[..., columns, :], values[..., columns, :]
            scores, slope = _scores(q, k, tile.hidden(columns), options)
            weights = torch.exp(scores - lse[..., tile.rows, None])
            grad_scores = weights * (_product(g, v.mT) - along[..., tile.rows, None]) * slope * options.scale
            grad_scores = grad_scores.to(query.dtype)
            # Heads of a group share their keys, so their gradients add up.
            grad_value[..., columns, :] += _product(weights.to(value.dtype).mT, g).sum(dim=2, keepdim=True)
            grad_key[..., columns, :] += _product(grad_scores.mT, q).sum(dim=2, keepdim=True)
            grad_query[..., tile.rows, :] += _product(grad_scores, k)
    return (
        grad_query.view_as(query).to(query.dtype),
        grad_key[:, :, 0].to(key.dtype),
        grad_value[:, :, 0].to(value.dtype),
    )


@dataclass(frozen=True, eq=False)
class _Tile:
    """A block of queries, and the blocks of keys that any of them sees."""

    rows: slice
    columns: list[slice]
    begin: Tensor
    """First key of each query, [batch, rows]."""
    end: Tensor
    """One past the last key of each query, [rows]."""

    def hidden(self, columns: slice) -> Tensor | None:
        """Return which pairs are not seen, [batch, 1, 1, rows, columns]; nothing if all are."""
        place = torch.arange(columns.start, columns.stop, device=self.end.device)
        hidden = (place < self.begin[..., None]) | (place >= self.end[:, None])
        return hidden[:, None, None]


def _tiles(query: Tensor, key: Tensor, first: Tensor | None, block: int) -> Iterator[_Tile]:
    queries, keys = query.size(2), key.size(2)
    if first is None:
        first = torch.zeros(1, queries, dtype=torch.int64, device=query.device)
    for start in range(0, queries, block):
        rows = slice(start, min(start + block, queries))
        begin, end = first[:, rows], torch.arange(rows.start, rows.stop, device=query.device) + (keys - queries + 1)
        lowest, highest = int(begin.min()) // block * block, keys - queries + rows.stop
        columns = [slice(column, min(column + block, keys)) for column in range(lowest, highest, block)]
        yield _Tile(rows, columns, begin, end)


def _scores(query: Tensor, key: Tensor, hidden: Tensor | None, options: FlashOptions) -> tuple[Tensor, Tensor | float]:
    """Return the scores of a tile, and how fast they grow with the products of queries and keys, but for the scale."""
    slope: Tensor | float = 1.0
    scores = _product(query, key.mT) * options.scale
    if options.softcap is not None:
        squeezed = torch.tanh(scores / options.softcap)
        scores, slope = options.softcap * squeezed, 1 - squeezed.square()
    return (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)), slope


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices; half precision is summed in float32, and stays there."""
    accurate = torch.promote_types(left.dtype, torch.float32)
    return left.to(accurate) @ right.to(accurate)


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """Return [batch, kv_heads, group, queries, head_dim]."""
    return cast(Tensor, x.unflatten(1, (key.size(1), x.size(1) // key.size(1))))


def _statistics(queries: Tensor) -> Tensor:
    """Return one empty number per query, in float32 or better."""
    return queries.new_empty(queries.shape[:-1], dtype=torch.promote_types(queries.dtype, torch.float32))

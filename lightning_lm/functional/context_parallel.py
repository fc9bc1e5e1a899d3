"""Causal attention over rows that are longer than one device can hold: each rank has some of the tokens of every row.

Keys and values, which grouped heads make small, are gathered from all ranks; queries stay where they are. A row is cut
into twice as many chunks as there are ranks, and rank r has the chunks r and 2 ranks - 1 - r, so that early queries,
which see few keys, and late ones are balanced.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, distributed

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.attention import causal_attention, require_heads
from lightning_lm.functional.documents import band

__all__ = ["context_parallel_attention", "gather_sequence", "shard_sequence"]


def shard_sequence(
    whole: Shaped[Tensor, "batch seq *rest"], group: distributed.ProcessGroup
) -> Shaped[Tensor, "batch local_seq *rest"]:
    """Return this rank's two chunks of every row.

    Args:
        whole: The same on all ranks.
        group: Process group that shards each row.

    Raises:
        ConfigurationError: If a row cannot be cut into equal chunks.
    """
    if whole.dim() < 2:
        raise ConfigurationError(
            f"The rows have shape {tuple(whole.shape)}, and [batch, seq, ...] is needed: row[None] for a single one."
        )
    size, rank = distributed.get_world_size(group), distributed.get_rank(group)
    if whole.size(1) % (2 * size):
        raise ConfigurationError(
            f"Rows of {whole.size(1)} tokens cannot be cut into {2 * size} equal chunks for {size} ranks; pad them to "
            f"a multiple of {2 * size}."
        )
    chunks = whole.chunk(2 * size, dim=1)
    return torch.cat((chunks[rank], chunks[-1 - rank]), dim=1)


def gather_sequence(
    local: Shaped[Tensor, "batch local_seq *rest"], group: distributed.ProcessGroup
) -> Shaped[Tensor, "batch seq *rest"]:
    """Return whole rows, in order; the gradient is summed over ranks and cut again. The inverse of `shard_sequence`.

    Args:
        local: This rank's two chunks.
        group: Process group that shards each row.
    """
    whole: Tensor = _Gather.apply(local, group)  # type: ignore[no-untyped-call]
    return whole


def context_parallel_attention(
    query: Float[Tensor, "batch heads local_seq head_dim"],
    key: Float[Tensor, "batch kv_heads local_seq head_dim"],
    value: Float[Tensor, "batch kv_heads local_seq head_dim"],
    *,
    group: distributed.ProcessGroup,
    document_ids: Int[Tensor, "batch seq"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads local_seq head_dim"]:
    """Attend from this rank's queries to all keys up to their places, exactly as on one device.

    Args:
        query: Queries of this rank's chunks, positions already applied; ``heads`` is a multiple of ``kv_heads``.
        key: Like ``query``.
        value: Like ``key``.
        group: Process group that shards each row; every one must call this.
        document_ids: Ids of the whole rows, equal inside a document; no token sees another document's.
        window: Number of keys a query sees, itself included; ``None`` for all.
        softcap: Scores are squeezed to ``softcap * tanh(score / softcap)``.
        scale: Multiplies the scores; ``None`` for ``1 / sqrt(head_dim)``.

    Source:
        Grattafiori et al. 2024 (Llama 3), arXiv:2407.21783, section 3.3.2, "Context parallelism for long sequences".
    """
    require_heads(query, key, value)
    needed = (query.size(0), query.size(2) * distributed.get_world_size(group))
    if document_ids is not None and document_ids.shape != needed:
        raise ConfigurationError(
            f"document_ids has shape {tuple(document_ids.shape)}; those of the whole rows are needed, {needed}."
        )
    keys_and_values = torch.cat((key, value), dim=-1).transpose(1, 2)
    keys, values = gather_sequence(keys_and_values, group).transpose(1, 2).chunk(2, dim=-1)
    mixed = []
    for start, part in zip(_starts(query.size(2) // 2, group), query.chunk(2, dim=2), strict=True):
        stop = start + part.size(2)
        first = 0 if window is None else max(0, start - window + 1)
        mask = None if document_ids is None else _mask(document_ids, slice(start, stop), slice(first, stop), window)
        seen, weighed = keys[:, :, first:stop], values[:, :, first:stop]
        mixed.append(causal_attention(part, seen, weighed, mask=mask, window=window, softcap=softcap, scale=scale))
    return torch.cat(mixed, dim=2)


def _starts(length: int, group: distributed.ProcessGroup) -> tuple[int, int]:
    """Return where this rank's chunks begin in a row."""
    size, rank = distributed.get_world_size(group), distributed.get_rank(group)
    return rank * length, (2 * size - 1 - rank) * length


def _mask(document_ids: Tensor, queries: slice, keys: slice, window: int | None) -> Tensor:
    same = document_ids[:, queries, None] == document_ids[:, None, keys]
    near = band(queries.stop - queries.start, keys.stop - keys.start, window, device=document_ids.device)
    return (same & near).unsqueeze(1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(group.size())]
        distributed.all_gather(parts, local.contiguous(), group)
        return _in_order(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        chunks = gradients[0].chunk(2 * size, dim=1)
        parts = [torch.cat((chunks[rank], chunks[-1 - rank]), dim=1) for rank in range(size)]
        mine = torch.empty_like(parts[0])
        distributed.reduce_scatter(mine, parts, group=ctx.group)
        return mine, None


def _in_order(parts: Sequence[Tensor]) -> Tensor:
    halves = [part.chunk(2, dim=1) for part in parts]
    return torch.cat([*(early for early, _ in halves), *(late for _, late in reversed(halves))], dim=1)

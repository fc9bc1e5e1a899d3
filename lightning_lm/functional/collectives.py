"""Differentiable collectives.

On a rank a tensor is replicated, a shard along one dimension, or a partial sum. The gradient of a replicated tensor is
replicated; that of the input of a tensor-parallel region comes back as partial sums. Shards are equally long: the last
ones are padded with zeros, which are cut off after gathering.

Source:
    Shoeybi et al. 2019, arXiv:1909.08053, section 3; along the sequence: Korthikanti et al. 2022, arXiv:2205.05198.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from lightning_lm.deprecation import renamed_exports

__all__ = ["all_gather", "all_reduce", "copy_to", "gather_replicated", "reduce_from", "reduce_scatter", "shard_of"]


def copy_to(x: Float[Tensor, "*shape"], group: ProcessGroup) -> Float[Tensor, "*shape"]:
    """Copy a replicated tensor to a tensor-parallel region: identity forward, all-reduce backward.

    Args:
        x: The same on each rank.
        group: Process group.
    """
    return cast(Tensor, _CopyTo.apply(x, group))  # type: ignore[no-untyped-call]


def reduce_from(x: Float[Tensor, "*shape"], group: ProcessGroup) -> Float[Tensor, "*shape"]:
    """Reduce partial sums from a tensor-parallel region: all-reduce forward, identity backward.

    Args:
        x: This rank's partial sum.
        group: Process group.
    """
    return cast(Tensor, _ReduceFrom.apply(x, group))  # type: ignore[no-untyped-call]


def all_gather(x: Tensor, group: ProcessGroup, *, dim: int, length: int) -> Tensor:
    """Gather shards for a tensor-parallel region: all-gather forward, reduce-scatter backward.

    Args:
        x: This rank's shard.
        group: Process group.
        dim: Sharded dimension.
        length: Size of the whole tensor along the dimension.
    """
    return cast(Tensor, _AllGather.apply(x, group, dim, length, True))  # type: ignore[no-untyped-call]


def gather_replicated(x: Tensor, group: ProcessGroup, *, dim: int, length: int) -> Tensor:
    """Gather shards for a computation that every rank repeats: all-gather forward, slice backward.

    Args:
        x: This rank's shard.
        group: Process group.
        dim: Sharded dimension.
        length: Size of the whole tensor along the dimension.
    """
    return cast(Tensor, _AllGather.apply(x, group, dim, length, False))  # type: ignore[no-untyped-call]


def reduce_scatter(x: Tensor, group: ProcessGroup, *, dim: int) -> Tensor:
    """Reduce partial sums to shards: reduce-scatter forward, all-gather backward.

    Args:
        x: This rank's partial sum.
        group: Process group.
        dim: Dimension to shard.
    """
    return cast(Tensor, _ReduceScatter.apply(x, group, dim, True))  # type: ignore[no-untyped-call]


def shard_of(x: Tensor, group: ProcessGroup, *, dim: int) -> Tensor:
    """Take this rank's shard of a replicated tensor: slice forward, all-gather backward.

    Args:
        x: The same on each rank.
        group: Process group.
        dim: Dimension to shard.
    """
    return cast(Tensor, _ReduceScatter.apply(x, group, dim, False))  # type: ignore[no-untyped-call]


def all_reduce(x: Tensor, group: ProcessGroup, *, op: Any = distributed.ReduceOp.SUM) -> Tensor:
    """Return the sum over ranks, or another reduction, out of place and without a gradient.

    Args:
        x: This rank's values.
        group: Process group.
        op: Reduction, of ``torch.distributed.ReduceOp``.
    """
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, op, group=group)
    return total


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return all_reduce(upstream[0], ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ARG004
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return upstream[0], None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, length: int, reduces: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.reduces = group, dim, reduces
        return _join(x, group, dim, length)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        cut = _cut_sum if ctx.reduces else _cut
        return cut(upstream[0], ctx.group, ctx.dim), None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, reduces: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.length = group, dim, x.shape[dim]
        return (_cut_sum if reduces else _cut)(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _join(upstream[0], ctx.group, ctx.dim, ctx.length), None, None, None


def _join(x: Tensor, group: ProcessGroup, dim: int, length: int) -> Tensor:
    mine = x.movedim(dim, 0).contiguous()
    joined = mine.new_empty((group.size() * mine.shape[0], *mine.shape[1:]))
    _all_gather(joined, mine, group=group)
    return joined[:length].movedim(0, dim)


def _cut_sum(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    padded = _padded(x.movedim(dim, 0), group.size()).contiguous()
    mine = padded.new_empty((padded.shape[0] // group.size(), *padded.shape[1:]))
    _reduce_scatter(mine, padded, group=group)
    return mine.movedim(0, dim)


def _cut(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    return _padded(x.movedim(dim, 0), group.size()).chunk(group.size())[group.rank()].movedim(0, dim).clone()


def _padded(x: Tensor, parts: int) -> Tensor:
    """Pad the first dimension with zeros until it can be cut into equal shards."""
    missing = -x.shape[0] % parts
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x


def _all_gather(out: Tensor, mine: Tensor, *, group: ProcessGroup) -> None:
    newer = getattr(distributed, "all_gather_single", None)  # torch 2.13 gave it this name
    (newer or distributed.all_gather_into_tensor)(out, mine, group=group)


def _reduce_scatter(out: Tensor, partial_sum: Tensor, *, group: ProcessGroup) -> None:
    newer = getattr(distributed, "reduce_scatter_single", None)
    (newer or distributed.reduce_scatter_tensor)(out, partial_sum, group=group)


__getattr__ = renamed_exports(
    __name__,
    {
        "enter": "copy_to",
        "gather_parts": "all_gather",
        "leave": "reduce_from",
        "part_of": "shard_of",
        "scatter_sum": "reduce_scatter",
        "summed": "all_reduce",
        "whole_of": "gather_replicated",
    },
    until="0.3",
)

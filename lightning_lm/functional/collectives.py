"""Differentiable collectives.

A tensor is *whole* on a rank, or a *part* along one dimension, or a *summand*. Gradients of whole tensors are whole on
every rank; what enters a split computation comes back as summands. Parts are equally long: the last ones are filled
with zeros, which the receiver cuts off.

Source:
    Shoeybi et al. 2019, arXiv:1909.08053, section 3; along the sequence: Korthikanti et al. 2022, arXiv:2205.05198.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

__all__ = ["enter", "gather_parts", "leave", "part_of", "scatter_sum", "summed", "whole_of"]


def enter(x: Float[Tensor, "*shape"], group: ProcessGroup) -> Float[Tensor, "*shape"]:
    """Hand a whole tensor to a computation that is split over ranks; its gradients are added up.

    Args:
        x: The same on each rank.
        group: The ranks.
    """
    return cast(Tensor, _Enter.apply(x, group))  # type: ignore[no-untyped-call]


def leave(x: Float[Tensor, "*shape"], group: ProcessGroup) -> Float[Tensor, "*shape"]:
    """Add up the summands of all ranks; each gets the whole gradient.

    Args:
        x: This rank's summand.
        group: The ranks.
    """
    return cast(Tensor, _Leave.apply(x, group))  # type: ignore[no-untyped-call]


def gather_parts(x: Tensor, group: ProcessGroup, *, dim: int, length: int) -> Tensor:
    """Join the parts of all ranks for a computation that is split; gradients are added up and cut again.

    Args:
        x: This rank's part.
        group: The ranks.
        dim: Along which the parts lie.
        length: Size of the whole tensor along the dimension.
    """
    return cast(Tensor, _Gather.apply(x, group, dim, length, True))  # type: ignore[no-untyped-call]


def whole_of(x: Tensor, group: ProcessGroup, *, dim: int, length: int) -> Tensor:
    """Join the parts of all ranks for a computation that every rank does as a whole; gradients are cut.

    Args:
        x: This rank's part.
        group: The ranks.
        dim: Along which the parts lie.
        length: Size of the whole tensor along the dimension.
    """
    return cast(Tensor, _Gather.apply(x, group, dim, length, False))  # type: ignore[no-untyped-call]


def scatter_sum(x: Tensor, group: ProcessGroup, *, dim: int) -> Tensor:
    """Add up the summands of all ranks and keep this rank's part; gradients are joined.

    Args:
        x: This rank's summand.
        group: The ranks.
        dim: Along which the sum is cut.
    """
    return cast(Tensor, _Scatter.apply(x, group, dim, True))  # type: ignore[no-untyped-call]


def part_of(x: Tensor, group: ProcessGroup, *, dim: int) -> Tensor:
    """Keep this rank's part of a whole tensor; gradients are joined.

    Args:
        x: The same on each rank.
        group: The ranks.
        dim: Along which it is cut.
    """
    return cast(Tensor, _Scatter.apply(x, group, dim, False))  # type: ignore[no-untyped-call]


def summed(x: Tensor, group: ProcessGroup, *, largest: bool = False) -> Tensor:
    """Return the sum, or the largest, over ranks, without a gradient.

    Args:
        x: This rank's numbers.
        group: The ranks.
        largest: Take the largest.
    """
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM, group=group)
    return total


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return summed(upstream[0], ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ARG004
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return upstream[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, length: int, adds: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.adds = group, dim, adds
        return _join(x, group, dim, length)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        cut = _cut_sum if ctx.adds else _cut
        return cut(upstream[0], ctx.group, ctx.dim), None, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, adds: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.length = group, dim, x.shape[dim]
        return (_cut_sum if adds else _cut)(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _join(upstream[0], ctx.group, ctx.dim, ctx.length), None, None, None


def _join(x: Tensor, group: ProcessGroup, dim: int, length: int) -> Tensor:
    mine = x.movedim(dim, 0).contiguous()
    joined = mine.new_empty((group.size() * mine.shape[0], *mine.shape[1:]))
    _all_gather(joined, mine, group=group)
    return joined[:length].movedim(0, dim)


def _cut_sum(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    summand = _filled(x.movedim(dim, 0), group.size()).contiguous()
    mine = summand.new_empty((summand.shape[0] // group.size(), *summand.shape[1:]))
    _reduce_scatter(mine, summand, group=group)
    return mine.movedim(0, dim)


def _cut(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    return _filled(x.movedim(dim, 0), group.size()).chunk(group.size())[group.rank()].movedim(0, dim).clone()


def _filled(x: Tensor, parts: int) -> Tensor:
    """Append zeros until the first dimension can be cut into equal parts."""
    missing = -x.shape[0] % parts
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x


def _all_gather(out: Tensor, mine: Tensor, *, group: ProcessGroup) -> None:
    newer = getattr(distributed, "all_gather_single", None)  # torch 2.13 gave it this name
    (newer or distributed.all_gather_into_tensor)(out, mine, group=group)


def _reduce_scatter(out: Tensor, summand: Tensor, *, group: ProcessGroup) -> None:
    newer = getattr(distributed, "reduce_scatter_single", None)
    (newer or distributed.reduce_scatter_tensor)(out, summand, group=group)

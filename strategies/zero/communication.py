"""Communication of sharded optimizers: reduces gradients to the rank that updates, and broadcasts parameters from it.

On GPUs these are NCCL's collectives, one for all rows of a parameter where they divide evenly. On CPUs (gloo) a summand
goes straight to the rank that needs the sum: as many bytes, and half the CPU time of `torch.distributed.reduce`; a
broadcast of each piece takes a quarter of what `all_gather` takes.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from lightning_lm.strategies.zero.partition import Placement, rows_of

__all__ = ["Transfer", "reduce_rows", "reduce_to", "share_pieces"]

_DIRECT_BYTES = 2**20
"""Parameters below this size travel together."""
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
"""Names of torch from 2.13 on, and those before."""


class Transfer:
    """A sum on its way to the rank that needs it.

    Args:
        works: Pending communication to wait for.
        parts: On that rank what adds up to the sum, all of one size and the first to be written to; elsewhere nothing.
        summands: This rank's own share of the sum, where it is not in ``parts``: tensors laid end to end.
        sent: Tensors that must stay in memory until they are sent.
    """

    def __init__(
        self, works: Sequence[Any], parts: Sequence[Tensor], summands: Sequence[Tensor] = (), sent: Tensor | None = None
    ) -> None:
        self._works, self._parts, self._summands, self._sent = works, parts, summands, sent

    @property
    def num_bytes(self) -> int:
        """Memory that is held."""
        held = [*self._parts, *self._summands] if self._sent is None else [self._sent]
        return sum(tensor.nbytes for tensor in held)

    def is_completed(self) -> bool:
        """Return whether nothing has to be waited for, as far as it is known: gloo does not say of single messages."""
        return all(work.is_completed() for work in self._works)

    def arrive(self) -> Tensor | None:
        """Wait, and return the sum on the rank that needs it, flat."""
        for work in self._works:
            work.wait()
        if not self._parts:
            return None
        total, *others = self._parts
        for other in others:
            total.add_(other)
        if self._summands:
            own = [summand.reshape(-1) for summand in self._summands]
            torch._foreach_add_(list(total.split([len(summand) for summand in own])), own)
        return total


def reduce_to(owner: int, summands: Sequence[Tensor], *, tag: int = 0) -> Transfer:
    """Begin to add up tensors of all ranks on one of them. Every rank must call this, in one order.

    Args:
        owner: The rank.
        summands: Partial sums of this rank, of one type and on one device; left alone until the transfer arrives.
        tag: The same on every rank, different from those of other transfers that are on their way.
    """
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    if not _goes_straight(summands[0]):
        flat = _flat(summands, fresh=rank == owner)
        work = distributed.reduce(flat, owner, async_op=True)
        return Transfer([work], [flat] if rank == owner else [], sent=flat)
    if rank != owner:
        flat = _flat(summands)
        return Transfer([distributed.isend(flat, owner, tag=tag)], [], sent=flat)
    size = sum(summand.numel() for summand in summands)
    parts = {other: summands[0].new_empty(size) for other in range(ranks) if other != rank}
    works = [distributed.irecv(part, other, tag=tag) for other, part in parts.items()]
    return Transfer(works, list(parts.values()), summands)


def reduce_rows(gradient: Tensor, placement: Placement, *, tag: int = 0) -> list[Transfer]:
    """Begin to add up a gradient of all ranks, each piece on the rank that has it. Every rank must call this.

    Args:
        gradient: Gradient of this rank; left alone until the transfers arrive.
        placement: Its pieces.
        tag: As for `reduce_to`.
    """
    if _goes_straight(gradient) or not _is_even(placement):
        return [reduce_to(piece.rank, [rows_of(gradient, piece)], tag=tag) for piece in placement]
    whole = gradient.contiguous()
    own = whole.new_empty(whole.numel() // len(placement))
    return [Transfer([_reduce_scatter(own, whole.view(-1), async_op=True)], [own], sent=whole)]


def share_pieces(placements: Iterable[tuple[Tensor, Placement]], group: distributed.ProcessGroup | None = None) -> None:
    """Send every piece from its rank to all others, and wait; small ones of one rank travel together.

    Args:
        placements: Parameters and their pieces, in the same order on every rank.
        group: Ranks that share them; by default all.
    """
    rank = distributed.get_rank(group)
    small: dict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)
    works = []
    for tensor, placement in placements:
        if not _goes_straight(tensor) and _is_even(placement, group) and tensor.is_contiguous():
            own = rows_of(tensor, placement[rank])
            works.append(_all_gather(tensor.view(-1), own.view(-1), group=group, async_op=True))
            continue
        for piece in placement:
            rows = rows_of(tensor, piece)
            if rows.nbytes < _DIRECT_BYTES or not rows.is_contiguous():
                small[piece.rank, rows.dtype].append(rows)
            else:
                works.append(distributed.broadcast(rows, group=group, group_src=piece.rank, async_op=True))
    flat = {key: torch.cat([rows.reshape(-1) for rows in tensors]) for key, tensors in small.items()}
    for (owner, _), tensor in flat.items():
        works.append(distributed.broadcast(tensor, group=group, group_src=owner, async_op=True))
    for work in works:
        assert work is not None
        work.wait()
    for key, tensors in small.items():
        if key[0] != rank:
            parts = flat[key].split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [part.view_as(like) for part, like in zip(parts, tensors, strict=True)])


def _goes_straight(tensor: Tensor) -> bool:
    """Return whether messages from rank to rank are cheaper than collectives."""
    return tensor.device.type == "cpu"


def _is_even(placement: Placement, group: distributed.ProcessGroup | None = None) -> bool:
    """Return whether every rank has as many rows as every other."""
    sizes = {piece.stop - piece.start for piece in placement}
    return len(placement) == distributed.get_world_size(group) > 1 and len(sizes) == 1


def _flat(tensors: Sequence[Tensor], *, fresh: bool = False) -> Tensor:
    """Return tensors end to end, without a copy where one will do."""
    if len(tensors) > 1:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat = tensors[0].contiguous().view(-1)
    return flat.clone() if fresh and flat.untyped_storage().nbytes() > flat.nbytes else flat

"""Communication of sharded optimizers: gradients to the rank that updates, parameters and optimizer state from it.

On GPUs these are NCCL's reduce-scatter and all-gather for a parameter whose rows divide evenly, else reduce and
broadcast. On CPUs (gloo) partial sums are sent to the rank that needs the total: as many bytes as
`torch.distributed.reduce`, and half its CPU time; a broadcast of each piece takes a quarter of the CPU time of
`all_gather`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from lightning_lm.strategies.zero.partition import Piece, Placement, rows_of

__all__ = ["State", "Transfer", "gather_pieces", "gather_states", "map_tensors", "reduce_rows", "reduce_to"]

_DIRECT_BYTES = 2**20
"""Pieces below this size share a message."""
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
"""Names of torch from 2.13 on, and those before."""


class Transfer:
    """A pending reduction to the rank that needs the total.

    Args:
        works: Pending communication to wait for.
        parts: On that rank the partial sums, all of one size; the first is overwritten. Empty on other ranks.
        summands: Partial sum of this rank if it is not in ``parts``: tensors to be concatenated.
        sent: Tensors that must stay in memory until they are sent.
    """

    def __init__(
        self, works: Sequence[Any], parts: Sequence[Tensor], summands: Sequence[Tensor] = (), sent: Tensor | None = None
    ) -> None:
        self._works, self._parts, self._summands, self._sent = works, parts, summands, sent

    @property
    def num_bytes(self) -> int:
        """Memory in use until the reduction is complete, bytes."""
        held = [*self._parts, *self._summands] if self._sent is None else [self._sent]
        return sum(tensor.nbytes for tensor in held)

    def is_completed(self) -> bool:
        """Return whether all work is known to be complete; gloo does not report single messages."""
        return all(work.is_completed() for work in self._works)

    def arrive(self) -> Tensor | None:
        """Wait, and return the total, flat, on the rank that needs it."""
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
    """Start to reduce tensors of all ranks to one of them. Collective: call on all ranks, in the same order.

    Args:
        owner: Rank that gets the total.
        summands: Partial sums of this rank, of one type and device; not to be changed until the transfer arrives.
        tag: Tag of the messages, the same on every rank and different from those of other pending transfers.
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
    """Start to reduce-scatter a gradient to the ranks that own its pieces. Collective: call on all ranks.

    Args:
        gradient: Gradient of this rank; not to be changed until the transfers arrive.
        placement: Its pieces.
        tag: As for `reduce_to`.
    """
    if _goes_straight(gradient) or not _is_even(placement):
        return [reduce_to(piece.rank, [rows_of(gradient, piece)], tag=tag) for piece in placement]
    whole = gradient.contiguous()
    own = whole.new_empty(whole.numel() // len(placement))
    return [Transfer([_reduce_scatter(own, whole.view(-1), async_op=True)], [own], sent=whole)]


def gather_pieces(
    placements: Iterable[tuple[Tensor, Placement]], group: distributed.ProcessGroup | None = None
) -> None:
    """All-gather parameters from the ranks that own their pieces, and wait; small pieces of a rank share a message.

    Args:
        placements: Parameters and their pieces, in the same order on every rank.
        group: Ranks over which they are sharded; by default all.
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


State = dict[str, Any]
"""State of one parameter: tensors, numbers, and lists and dictionaries of these."""


class _Slot(NamedTuple):
    """Stands for a tensor in what is sent ahead."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return the same structure with another value for each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, function) for item in value)
    return value


def gather_states(
    states: Mapping[int, State],
    splits: Mapping[int, Sequence[Piece]],
    device: torch.device,
    group: distributed.ProcessGroup | None = None,
) -> dict[int, State] | None:
    """Bring the states of all ranks to the CPU of rank 0. Collective: call on all ranks.

    Beside the result rank 0 needs room for one tensor, on its device and on the CPU.

    Args:
        states: States of this rank, by the index of the parameter.
        splits: Pieces of the parameters that are split by rows, by number; their states have rows too.
        device: Device for the communication.
        group: Ranks that share the state; by default all.

    Returns:
        All states on rank 0, ``None`` elsewhere.
    """
    outline = map_tensors(dict(states), lambda tensor: _Slot(tuple(tensor.shape), tensor.dtype))
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    outlines: list[Any] | None = [None] * size if rank == 0 else None
    distributed.gather_object(outline, outlines, group=group, group_dst=0)
    if outlines is None:
        for number in sorted(states):
            map_tensors(states[number], lambda tensor: _send(tensor.to(device).contiguous(), group))
        return None
    whole = {number: map_tensors(state, _on_cpu) for number, state in states.items() if number not in splits}
    parts: dict[int, dict[int, State]] = {number: {0: states[number]} for number in splits if number in states}
    for source in range(1, size):
        for number in sorted(outlines[source]):
            state = _received(outlines[source][number], source, device, group)
            if number in splits:
                parts.setdefault(number, {})[source] = state
            else:
                whole[number] = state
    for number in list(parts):
        whole[number] = _joined(parts.pop(number), splits[number])
    return {number: whole[number] for number in sorted(whole)}


def _send(tensor: Tensor, group: distributed.ProcessGroup | None) -> None:
    distributed.send(tensor, group=group, group_dst=0)


def _received(outline: Any, source: int, device: torch.device, group: distributed.ProcessGroup | None) -> Any:
    if isinstance(outline, _Slot):
        buffer = torch.empty(outline.shape, dtype=outline.dtype, device=device)
        distributed.recv(buffer, group=group, group_src=source)
        return buffer.cpu()
    if isinstance(outline, dict):
        return {key: _received(item, source, device, group) for key, item in outline.items()}
    if type(outline) in (list, tuple):
        return type(outline)(_received(item, source, device, group) for item in outline)
    return outline


def _joined(parts: dict[int, State], pieces: Sequence[Piece]) -> State:
    """Put rows together; what has no rows (a step count) is the same on all ranks."""
    ordered = [parts[piece.rank] for piece in pieces]
    joined: State = {}
    for key, first in ordered[0].items():
        has_rows = isinstance(first, Tensor) and first.dim() > 0 and len(first) == pieces[0].stop - pieces[0].start
        joined[key] = torch.cat([_on_cpu(part[key]) for part in ordered]) if has_rows else map_tensors(first, _on_cpu)
    return joined


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()

"""Optimizer state from all ranks to one, one tensor at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from lightning_lm.strategies.zero.partition import Piece

__all__ = ["State", "gather_states", "map_tensors"]

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
    """Bring the states of all ranks to the CPU of rank 0; every rank must call this.

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

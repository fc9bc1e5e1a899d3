"""Gradients that are sharded over meshes: their norm over all ranks, and optimizer steps mesh by mesh."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from torch.optim import Optimizer

from lightning_lm.functional.dtypes import to_accumulate

__all__ = ["gradients_of", "groups_by_mesh", "local_parts", "mesh_of", "step_by_mesh", "total_norm"]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients of all parameters of an optimizer, in any layout."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [_reduced(parameter) for parameter in parameters if parameter.grad is not None]


def _reduced(parameter: Tensor) -> Tensor:
    """Reduce a gradient that torch's own layouts may leave as partial sums."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and any(isinstance(place, Partial) for place in gradient.placements):
        assert isinstance(parameter, DTensor)
        parameter.grad = gradient = gradient.redistribute(placements=parameter.placements)
    assert gradient is not None
    return gradient


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the local shards of tensors, as views."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """Return the mesh of a sharded tensor."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def groups_by_mesh(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of tensors of the same mesh: torch's multi-tensor functions take no others together."""
    found: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        found[mesh_of(tensor)].append(tensor)
    yield from found.values()


def total_norm(gradients: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Return the norm of all gradients together, a plain tensor that is the same on all ranks.

    Args:
        gradients: In any layout; what is whole on several ranks counts once.
        norm_type: Order of the norm.
    """
    found: dict[Any, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        found[_sharing_axes(gradient)].append(gradient)
    largest = norm_type == float("inf")
    totals = []
    for axes, together in found.items():  # in the order of parameters, which ranks agree on
        norm = torch.nn.utils.get_total_norm(local_parts(together), norm_type)
        total = norm if largest else to_accumulate(norm) ** norm_type
        for axis in axes:
            distributed.all_reduce(total, distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM, group=axis)
        totals.append(total)
    if not totals:
        return torch.zeros(())
    whole = torch.stack(totals)
    return whole.max() if largest else (whole.sum() ** (1 / norm_type)).float()


def _sharing_axes(tensor: Tensor) -> tuple[distributed.ProcessGroup, ...]:
    """Return the groups over which a tensor is sharded, axis by axis."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(axis) for axis, place in enumerate(tensor.placements) if not place.is_replicate())


def step_by_mesh(optimizer: Optimizer) -> None:
    """Split the parameter groups of an optimizer by mesh during each step.

    Fused and ``foreach`` implementations refuse plain tensors beside DTensors, and DTensors of two meshes. Only while
    a step runs are the groups cut; schedulers, clipping and checkpoints see those that the user made.

    Args:
        optimizer: Any; of one that has ``children`` each child is prepared.
    """
    for inner in getattr(optimizer, "children", (optimizer,)):
        cut: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
        inner.register_step_pre_hook(functools.partial(_cut, cut))
        inner.register_step_post_hook(functools.partial(_join, cut))


def _cut(cut: list[Any], optimizer: Optimizer, *_: Any) -> None:
    if cut:  # the step before was broken off
        _join(cut, optimizer)
    cut[:] = [(group, list(_parts(group))) for group in optimizer.param_groups]
    optimizer.param_groups[:] = [part for _, parts in cut for part in parts]


def _parts(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    lists = list(groups_by_mesh(group["params"]))
    if len(lists) < 2:
        yield group
        return
    for params in lists:
        yield {**group, "params": params}


def _join(cut: list[Any], optimizer: Optimizer, *_: Any) -> None:
    for group, (part, *_) in cut:
        if part is not group:  # an optimizer may keep numbers in its groups
            group.update({name: value for name, value in part.items() if name != "params"})
    optimizer.param_groups[:] = [group for group, _ in cut]
    cut.clear()

"""Optimizers that take many parameters at once, for parameters that are shared by different ranks."""

import functools
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from lightning_lm.strategies.tensor_parallel.gradients import groups_by_mesh

__all__ = ["step_by_mesh"]


def step_by_mesh(optimizer: Optimizer) -> None:
    """Let each step of an optimizer see groups whose parameters are all shared by the same ranks.

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

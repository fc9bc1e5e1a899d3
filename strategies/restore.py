"""Weights and optimizer state into a model that ranks share, from a folder or from a file of an ordinary run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lm.functional.dtensor import cut_like, local_part
from lightning_lm.modules.checkpoint import check_weights
from lightning_lm.strategies.checkpoints.sharded import read_into

__all__ = ["load_model", "load_optimizer"]


def load_model(module: nn.Module, state: Mapping[str, Any], folder: Path | None, *, strict: bool) -> None:
    """Load each rank's part of the weights, in place.

    Args:
        module: The model.
        state: Whole tensors, or with a folder empty ones.
        folder: Folder of the shards.
        strict: Refuse other names.

    Raises:
        CheckpointError: If names or shapes do not fit.
    """
    targets = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    found = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not strict:
        targets = {name: value for name, value in targets.items() if name in found}
        found = {name: found[name] for name in targets}
    check_weights(found, targets, source="The checkpoint")
    _fill(targets, found, folder, "state_dict")


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any], folder: Path | None, index: int) -> None:
    """Load each rank's part of the state of an optimizer.

    Args:
        optimizer: Optimizer of the sharded model.
        state: A plain state dictionary with whole tensors, or with a folder empty ones.
        folder: Folder of the shards.
        index: Number of the optimizer.
    """
    parameters = _parameters_by_id(optimizer, state["param_groups"])
    filled: dict[Any, dict[str, Any]] = {}
    targets: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for number, values in state["state"].items():
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        places = {name: _place_for(value, parameters[int(number)]) for name, value in tensors.items()}
        targets.update({f"{number}/{name}": place for name, place in places.items()})
        found.update({f"{number}/{name}": value for name, value in tensors.items()})
        filled[number] = {**values, **places}
    _fill(targets, found, folder, f"optimizer_states/{index}/state")  # once: each reading is agreed on by all ranks
    optimizer.load_state_dict({**state, "state": filled})


def _parameters_by_id(optimizer: Optimizer, groups: list[dict[str, Any]]) -> dict[int, Tensor]:
    """Find the parameter that each number in a state dictionary means: by name where there are names."""
    ours = optimizer.param_groups
    ids = [number for group in groups for number in group["params"]]
    parameters = [parameter for group in ours for parameter in group["params"]]
    if all("param_names" in group for group in [*groups, *ours]):
        named = dict(zip([name for group in ours for name in group["param_names"]], parameters, strict=True))
        names = [name for group in groups for name in group["param_names"]]
        return {number: named[name] for number, name in zip(ids, names, strict=True) if name in named}
    return dict(zip(ids, parameters, strict=True))


def _place_for(value: Tensor, parameter: Tensor) -> Tensor:
    """Return an empty tensor laid out like its parameter where the state has its shape."""
    if value.shape == parameter.shape and value.dim():
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    return torch.empty(value.shape, dtype=value.dtype)


def _fill(targets: Mapping[str, Tensor], found: Mapping[str, Tensor], folder: Path | None, place: str) -> None:
    if folder is not None:
        read_into({f"{place}/{name}": target for name, target in targets.items()}, folder)
        return
    with torch.no_grad():
        for name, target in targets.items():
            local_part(target).detach().copy_(cut_like(found[name], target))

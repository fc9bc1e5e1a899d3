"""Folders that Lightning's own `ModelParallelStrategy` and `FSDPStrategy` write, read as plain checkpoints.

They have the weights and each optimizer's state under names of parameters in torch's format, and in ``meta.pt`` all
that is left of the checkpoint.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lightning_lm.errors import CheckpointError
from lightning_lm.modules.checkpoint import reading
from lightning_lm.strategies.checkpoints.folder_reader import load_tensors, read_metadata

__all__ = ["is_stock", "read_stock"]

_WEIGHTS = ("state_dict", "model")
"""First key of weights: of `ModelParallelStrategy` and of `FSDPStrategy`."""
_OPTIMIZER = "optimizer_"


def is_stock(path: Path | str) -> bool:
    """Return whether a folder was written by one of Lightning's own strategies.

    Args:
        path: A folder with a checkpoint.

    Raises:
        CheckpointError: If its description cannot be read.
    """
    return any(len(place) > 1 and place[0] in _WEIGHTS for place in _places(read_metadata(path)).values())


def read_stock(path: Path | str) -> dict[str, Any]:
    """Read a folder onto the CPU, weights and optimizers whole. Needs no process group.

    Args:
        path: The folder.

    Raises:
        CheckpointError: If it is damaged or has more than tensors and plain data.
    """
    folder, metadata = Path(path), read_metadata(path)
    described = metadata.state_dict_metadata
    kinds = {name: kind for name, kind in described.items() if isinstance(kind, TensorStorageMetadata)}
    tensors = {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in kinds.items()}
    load_tensors(tensors, folder)
    values = {**tensors, **{name: _plain(folder, metadata, name) for name in described if name not in kinds}}
    nest: dict[Any, Any] = {}
    for name, place in _places(metadata).items():
        inner = nest
        for key in place[:-1]:
            inner = inner.setdefault(key, {})
        inner[place[-1]] = values[name]
    with reading(folder):
        checkpoint: dict[str, Any] = torch.load(folder / "meta.pt", map_location="cpu", weights_only=True)
    checkpoint["state_dict"] = next(nest[key] for key in _WEIGHTS if key in nest)
    names = sorted(
        (key for key in nest if str(key).startswith(_OPTIMIZER)), key=lambda key: int(key[len(_OPTIMIZER) :])
    )
    checkpoint["optimizer_states"] = [_by_number(nest[name]) for name in names]
    return checkpoint


def _places(metadata: Metadata) -> dict[str, tuple[Any, ...]]:
    """Return the path of each value in the nest that was saved."""
    data = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    return {name: place for name, place in data.items() if isinstance(place, tuple)}


def _plain(folder: Path, metadata: Metadata, name: str) -> Any:
    info = metadata.storage_data.get(MetadataIndex(name))
    if info is None:
        raise CheckpointError(f"{folder} does not say where {name} lies. Use another checkpoint.")
    file = folder / info.relative_path
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the folder was copied in part. Copy all of it.")
    with reading(folder), file.open("rb") as stream:
        stream.seek(info.offset)
        return torch.load(io.BytesIO(stream.read(info.length)), map_location="cpu", weights_only=True)


def _by_number(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state in its own form: parameters are numbered in the order of groups."""
    named = [group for _, group in sorted(state.get("param_groups", {}).items())]
    numbers = {name: number for number, name in enumerate(name for group in named for name in group["params"])}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in named]
    kept = {numbers[name]: values for name, values in state.get("state", {}).items()}
    return {"state": {number: kept[number] for number in sorted(kept)}, "param_groups": groups}

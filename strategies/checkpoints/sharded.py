"""Sharded checkpoints: folders in which each rank writes its shards, beside an ordinary checkpoint without tensors.

``meta.pt`` is the checkpoint with empty tensors in their places, which is all that rank 0 writes alone; the tensors lie
beside it in torch's format for distributed checkpoints, under their path in the checkpoint. So any number of ranks, and
a single process without a process group, can read it.
"""

import enum
import io
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_lm.errors import CheckpointError
from lightning_lm.functional.dtensor import cut_like, local_part
from lightning_lm.modules.checkpoint import check_weights, reading
from lightning_lm.storage import rename, sync_folder, synced, system_error
from lightning_lm.strategies.checkpoints.digests import FILE, as_file, check_folder, digests_of, take_as_sound
from lightning_lm.strategies.checkpoints.folder_reader import METADATA, agreed, load_tensors
from lightning_lm.strategies.checkpoints.stock_folder import is_stock, read_stock

__all__ = [
    "check_together",
    "is_sharded",
    "load_model",
    "load_optimizer",
    "put",
    "read_into",
    "read_sharded",
    "remove",
    "replaced",
    "whole_tensor",
    "write_sharded",
]

_META = "meta.pt"
_TENSORS = ("state_dict", "optimizer_states")
"""Entries whose plain tensors are written with the others; elsewhere they stay where they are."""

Path_ = tuple[str, ...]
Leaf = Callable[[Path_, Any], Any]


def is_sharded(path: Path | str) -> bool:
    """Return whether a path is the folder of a sharded checkpoint.

    Args:
        path: Any.
    """
    return any((Path(path) / name).is_file() for name in (_META, METADATA))


def replaced(content: Any, leaf: Leaf, path: Path_ = ()) -> Any:
    """Return nested dictionaries, lists and tuples with every leaf replaced.

    Args:
        content: The nest.
        leaf: Returns what stands in the place of a leaf, given its path.
        path: Path of the nest itself.
    """
    if isinstance(content, Mapping):
        return {key: replaced(value, leaf, (*path, str(key))) for key, value in content.items()}
    if isinstance(content, list | tuple) and type(content) in (list, tuple):
        return type(content)(replaced(value, leaf, (*path, str(index))) for index, value in enumerate(content))
    return leaf(path, content)


# --- writing ---


def write_sharded(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a folder under a temporary name and rename it when all ranks are done. Collective: call on all ranks.

    Args:
        checkpoint: Checkpoint of Lightning, with the tensors as each rank holds them.
        path: The folder. What is there is replaced, and stays until the new one is whole.

    Raises:
        CheckpointError: On every rank, if it holds what could not be loaded again.
    """
    tensors: dict[str, Tensor] = {}

    def take_out(place: Path_, value: Any) -> Any:
        if isinstance(value, DTensor) or (isinstance(value, Tensor) and place[0] in _TENSORS):
            tensors["/".join(place)] = value
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        return _plain(value)

    content = _loadable(replaced(checkpoint, take_out))
    temporary = path.with_name(f".{path.name}.tmp")
    if distributed.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier()
    try:
        save(tensors, storage_writer=FileSystemWriter(temporary))
    except CheckpointException as error:  # on every rank; it has the failures of all
        raise _unwritten(path, error) from error
    digests = _gathered_digests(temporary)
    if distributed.get_rank() == 0:
        with synced(temporary / _META) as file:
            file.write(content)
        with synced(temporary / FILE) as file:
            file.write(as_file(digests | digests_of([temporary / _META])))
        sync_folder(temporary)
        put(temporary, path)
    distributed.barrier()


def _unwritten(path: Path, error: CheckpointException) -> CheckpointError:
    rank, failure = next((rank, failed[0]) for rank, failed in error.failures.items())
    cause = system_error(failure)
    reason = repr(failure) if cause is None else cause.strerror
    return CheckpointError(
        f"{path} was not written, because rank {rank} could not write its part: {reason}. The previous checkpoint of "
        "that name is untouched. Free some space on this disk or save elsewhere (ModelCheckpoint's dirpath)."
    )


def _gathered_digests(folder: Path) -> dict[str, Any]:
    """Return on rank 0 the digests of all files, each computed by the rank that wrote it."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    owners = {file: _writer_of(file.name, ranks) for file in folder.iterdir()}
    gathered: list[Any] | None = [None] * ranks if rank == 0 else None
    distributed.gather_object(digests_of(file for file, owner in owners.items() if owner == rank), gathered)
    return {name: digest for digests in gathered or () for name, digest in digests.items()}


def _writer_of(name: str, ranks: int) -> int:
    """Return the rank that wrote a file: torch names shards by it, ``__1_0.distcp``; rank 0 wrote all else."""
    found = re.match(r"__(\d+)_", name)
    return int(found[1]) % ranks if found else 0


def _plain(value: Any) -> Any:
    """Convert values that are common in hyper-parameters but cannot be loaded again to plain data."""
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _loadable(content: Any) -> bytes:
    """Return the bytes that rank 0 writes; on every rank an error if they could not be loaded again."""
    buffer, problem = io.BytesIO(), None
    if distributed.get_rank() == 0:
        try:
            torch.save(content, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError) as error:
            problem = str(error).partition("\n")[0]
    told = [problem]
    distributed.broadcast_object_list(told)
    if told[0] is not None:
        raise CheckpointError(
            f"The checkpoint has something other than tensors and plain data, and could not be read again: {told[0]} "
            "Leave it out of the hyper-parameters (save_hyperparameters(ignore=[...])) and of callbacks' state."
        )
    return buffer.getvalue()


def put(temporary: Path, path: Path) -> None:
    """Move a complete file or folder to a path, replacing the file or checkpoint there.

    A folder cannot replace anything, nor be replaced, in a single step. So the old one is first renamed to a name under
    which it is found too, if the process is killed at this moment.

    Args:
        temporary: In the same folder.
        path: The place: empty, or with a file, a link or a checkpoint.
    """
    previous = path.with_name(f"{path.stem}.replaced{path.suffix}")
    if path.is_symlink():
        if temporary.is_dir():
            path.unlink()
    elif is_sharded(path) or (temporary.is_dir() and path.exists()):
        remove(previous)
        os.replace(path, previous)
    rename(temporary, path)
    remove(previous)
    for left_behind in path.parent.glob(f".*{path.suffix}.old"):  # by a run that was killed while it removed
        shutil.rmtree(left_behind, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there; a kill leaves all of it or nothing.

    Args:
        path: File or folder to remove.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    hidden = path.with_name(f".{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


# --- reading ---


def read_sharded(path: Path | str, *, whole: bool = True) -> dict[str, Any]:
    """Read a folder onto the CPU. Needs no process group.

    Args:
        path: The folder.
        whole: Read all tensors; otherwise those of weights and optimizers stay empty, on the meta device. A folder of
            Lightning's own strategies is always read whole.

    Raises:
        CheckpointError: If it is truncated or damaged, or holds more than tensors and plain data.
    """
    if not (Path(path) / _META).is_file():
        raise CheckpointError(
            f"{path} has no {_META}: it was copied in part, or the run ended while it was saved. Copy the whole "
            "folder, or use an earlier checkpoint of the run."
        )
    check_folder(path)
    if is_stock(path):
        return read_stock(path)
    with reading(path):
        content = torch.load(Path(path) / _META, map_location="cpu", weights_only=True)
    tensors: dict[str, Tensor] = {}

    def fill(place: Path_, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_meta and (whole or place[0] not in _TENSORS):
            value = tensors["/".join(place)] = torch.empty(value.shape, dtype=value.dtype)
        return value

    checkpoint: dict[str, Any] = replaced(content, fill)
    load_tensors(tensors, path)
    return checkpoint


def check_together(path: Path | str) -> None:
    """Compare a folder with its digests, each rank some of the files. Collective: call on all ranks.

    Args:
        path: The folder.

    Raises:
        CheckpointError: On every rank, if a file is missing, truncated or damaged.
    """
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    agreed(lambda: check_folder(path, part=rank, parts=ranks))
    take_as_sound(path)


def read_into(tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Read each rank's shards of some tensors. Collective: call on all ranks.

    Args:
        tensors: By their path in the checkpoint, joined by ``/``; overwritten in place.
        path: The folder.
    """
    load_tensors(dict(tensors), path, alone=False)


# --- whole tensors ---


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor. Collective: call on all ranks that share it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_model(module: nn.Module, state: Mapping[str, Any], folder: Path | None, *, strict: bool) -> None:
    """Load each rank's shards of the weights, in place.

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
    """Load each rank's shards of the state of an optimizer.

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

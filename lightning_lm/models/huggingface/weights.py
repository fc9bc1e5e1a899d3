"""Weights in folders of safetensors files, one tensor at a time."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_lm.errors import CheckpointError
from lightning_lm.storage import INDEX, SINGLE, check_digests, replacing
from lightning_lm.storage.json_text import parse_json

__all__ = [
    "StoredTensor",
    "read_file",
    "read_json",
    "read_shapes",
    "read_tensors",
    "weight_files",
    "write_file",
    "write_json",
    "write_tensors",
]

_PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "*.pth", "*.pt", "*.ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is made only when its file is written."""

    name: str
    num_bytes: int
    make: Callable[[], Tensor]


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each tensor of a folder, holding one at a time.

    Args:
        folder: Holds ``model.safetensors``, or shards and their index.

    Raises:
        CheckpointError: If there are no safetensors files, a shard is missing, or a file is truncated.
    """
    for path in weight_files(folder):
        yield from read_file(path)


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a folder by name, without reading the tensors.

    Args:
        folder: As in `read_tensors`.

    Raises:
        CheckpointError: As there.
    """
    shapes = {}
    for path in weight_files(folder):
        with _opened(path) as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


def read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each tensor of a safetensors file, holding one at a time.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is truncated, of another kind, or has changed since it was written.
    """
    check_digests(path.parent, [path.name])
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - the handle is not iterable
            yield name, file.get_tensor(name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); fetch or save it again.") from error


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file.

    Args:
        path: File in a folder that `lightning_lm.storage.filling` gives.
        tensors: By name.
    """
    shard = [StoredTensor(name, value.nbytes, partial(value.detach().to, "cpu")) for name, value in tensors.items()]
    _save(path, shard)


def write_tensors(folder: Path, tensors: Sequence[StoredTensor], *, max_shard_bytes: int) -> None:
    """Write tensors as one file, or as shards with an index where one file would be too large.

    Args:
        folder: Folder without weights, such as `lightning_lm.storage.filling` gives; created if needed.
        tensors: Tensors to write. A shard's tensors are made together and dropped before the next shard.
        max_shard_bytes: Largest file, in bytes, unless a single tensor is larger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _plan(tensors, max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _save(folder / name, shard)
    if len(shards) > 1:
        weight_map = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
        total = sum(item.num_bytes for item in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        CheckpointError: If the file is missing, has changed since it was written, or holds no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}; give a folder that holds a Hugging Face checkpoint.")
    check_digests(path.parent, [path.name])
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch or save it again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not an object with settings.")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write an object as JSON, whole or not at all."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, each compared with its digest if it has one.

    Args:
        folder: Folder with ``model.safetensors``, or with shards and their index.

    Raises:
        CheckpointError: If there are none, one is missing or has changed, or the index names one outside the folder.
    """
    paths = _named_files(folder)
    check_digests(folder, [path.name for path in paths])
    return paths


def _named_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = _indexed_names(folder / INDEX)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} of {len(names)} shards: {missing[:4]}; fetch them.")
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds {pickles[0]}, a pickle, which can run any code when it is opened; only safetensors are "
            'read. If you trust it, convert it once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; give a folder with a Hugging Face checkpoint.")


def _indexed_names(path: Path) -> list[str]:
    """Return the names of the shards of an index, which must be files beside it."""
    weight_map = read_json(path).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    wrong = [name for name in names if not isinstance(name, str) or name in ("", "..") or set(name) & {"/", "\\", "\0"}]
    if wrong or not names:
        what = f"names {wrong[0]!r}, which is no file beside it" if wrong else "has no weight_map with names of files"
        raise CheckpointError(f"{path} {what}; only files in {path.parent} are read. Fetch or save the model again.")
    return sorted(names)


def _plan(tensors: Sequence[StoredTensor], max_shard_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    used = 0
    for item in tensors:
        if shards[-1] and used + item.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used += item.num_bytes
    return shards


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _save(path: Path, shard: Sequence[StoredTensor]) -> None:
    path.touch()
    mode = path.stat().st_mode  # that of any new file here; safetensors would make it the owner's alone
    try:
        save_file({item.name: item.make().contiguous() for item in shard}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        refused = re.search(r"os error (\d+)", str(error))  # the number of the system's error, which is in no field
        if refused is None:
            raise
        raise OSError(int(refused[1]), os.strerror(int(refused[1])), str(path)) from error
    path.chmod(mode)

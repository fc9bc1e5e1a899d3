"""A reader for folders in torch's distributed-checkpoint format that runs no code.

torch unpickles ``.metadata`` without restriction, and entries that are no tensors as well, so whoever writes a folder
can run any code where it is read. Here the pickle may name the classes below and nothing else, and these are replaced
by inert records while it is read; the real objects are then built from the fields that they have.
"""

import io
import pickle
import pickletools
import warnings
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_lm.errors import CheckpointError

__all__ = ["METADATA", "PlainLoadPlanner", "PlainReader", "agreed", "load_tensors", "read_metadata"]

T = TypeVar("T")

METADATA = ".metadata"
"""Name of the description in a folder."""
_CHECKPOINT_CLASSES: tuple[type, ...] = (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    torch_metadata.TensorStorageMetadata,
    torch_metadata.BytesStorageMetadata,
    torch_metadata.ChunkStorageMetadata,
    torch_metadata._MEM_FORMAT_ENCODING,
    _StorageInfo,
)
_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.Size)
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE")
_NESTS: tuple[str, ...] = (
    "EMPTY_TUPLE",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "EMPTY_LIST",
    "APPEND",
    "APPENDS",
    "EMPTY_DICT",
)
_NESTS += ("SETITEM", "SETITEMS", "MARK", "SHORT_BINUNICODE", "BINUNICODE")
_OBJECTS = ("STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "MEMOIZE", "BINGET", "LONG_BINGET", "PROTO", "FRAME", "STOP")
_OPERATIONS = frozenset((*_NUMBERS, *_NESTS, *_OBJECTS))
"""Those of the pickle format that torch's metadata consists of; with others a few bytes can ask for all memory."""
_DAMAGE = (EOFError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError)
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


class _Record:
    """An instance of a class that a pickle names, as the arguments and the state that it was pickled with."""

    kind: type

    def __new__(cls, *arguments: Any) -> "_Record":
        record = object.__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    arguments: tuple[Any, ...]
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Layout:
    """Stands for torch's function that finds a layout by its name."""


class _ForbiddenNameError(pickle.UnpicklingError):
    """A pickle names something outside the list."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return a new record class for an allowed name, so that a pickle can change nothing that outlives it."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return torch.Size
        kinds: dict[tuple[str, str], type] = {(kind.__module__, kind.__name__): kind for kind in _CHECKPOINT_CLASSES}
        kinds |= {(library, path): PurePath for library in ("pathlib", "pathlib._local") for path in _PATHS}
        kinds["torch.serialization", "_get_layout"] = _Layout
        if (module, name) not in kinds:
            raise _ForbiddenNameError(f"{module}.{name}")
        return type(name, (_Record,), {"kind": kinds[module, name]})


def read_metadata(folder: Path | str) -> Metadata:
    """Read the description of a folder's tensors.

    Args:
        folder: Contains ``.metadata``.

    Raises:
        CheckpointError: If it is missing or damaged, or names anything but the classes of such descriptions.
    """
    path = Path(folder) / METADATA
    try:
        metadata = _real(_unpickled(path.read_bytes()), {})
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {METADATA}, which says where its tensors lie: it was copied in part, or the run ended "
            "while it was saved. Copy the whole folder, or use an earlier checkpoint of the run."
        ) from error
    except _ForbiddenNameError as error:
        raise CheckpointError(
            f"{path} was not loaded: it names {error}, which descriptions of tensors never do; unpickling it could run "
            "any code. It is damaged or was tampered with; use another checkpoint."
        ) from error
    except (*_DAMAGE, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged: {error or type(error).__name__}. Use another checkpoint.") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} is damaged: it describes no tensors. Use another checkpoint.")
    for info in metadata.storage_data.values():
        _check_place(path, info)
    return metadata


def _unpickled(content: bytes) -> Any:
    for operation, _, _ in pickletools.genops(content):
        if operation.name not in _OPERATIONS:
            raise ValueError(f"it contains the pickle operation {operation.name}")
    return _Unpickler(io.BytesIO(content)).load()


def _real(value: Any, known: dict[int, Any]) -> Any:
    """Return plain data as it is, and for records the objects that they stand for, each once."""
    if isinstance(value, _PLAIN):
        return value
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, dict):
        real: Any = {_real(key, known): _real(item, known) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        real = type(value)(_real(item, known) for item in value)
    elif isinstance(value, _Record):
        real = _object_of(value, known)
    else:
        raise _ForbiddenNameError(type(value).__name__)
    known[id(value)] = real
    return real


def _object_of(record: _Record, known: dict[int, Any]) -> Any:
    kind, arguments, state = type(record).kind, record.arguments, _real(record.state, known)
    if kind is PurePath:
        return PurePath(*(str(part) for part in arguments))
    if kind is _Layout:
        layout = getattr(torch, str(arguments[0]).removeprefix("torch."))
        if not isinstance(layout, torch.layout):
            raise ValueError(f"{arguments[0]} is no layout")
        return layout
    if kind is torch_metadata._MEM_FORMAT_ENCODING:
        return kind(int(arguments[0]))
    if kind is TensorProperties:
        properties = TensorProperties()
        properties.__setstate__(state)
        return properties
    return kind(**(state or {}))  # a dataclass, which refuses what is no field of it


def _check_place(path: Path, info: Any) -> None:
    """Refuse tensors outside the folder, and content that would be passed through a program before it is read."""
    if not isinstance(info, _StorageInfo) or not isinstance(info.relative_path, str):
        raise CheckpointError(f"{path} is damaged: it does not say where tensors lie. Use another checkpoint.")
    name = info.relative_path
    if name in ("", ".", "..") or PurePath(name).name != name or "\\" in name:
        raise CheckpointError(f"{path} names {name!r}, which lies outside the folder. Use another checkpoint.")
    if info.transform_descriptors:
        raise CheckpointError(
            f"{path} describes transformed files ({info.transform_descriptors}), which are not read here. Save without "
            "extensions."
        )


class PlainReader(FileSystemReader):
    """`FileSystemReader` whose metadata is read by `read_metadata`.

    The metadata is read when the reader is made: torch would read it twice and log each failure with its traceback.

    Args:
        path: The folder.

    Raises:
        CheckpointError: See `read_metadata`.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self._metadata = read_metadata(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the description of the folder's tensors."""
        return self._metadata


class PlainLoadPlanner(DefaultLoadPlanner):
    """`DefaultLoadPlanner` for tensors alone: torch unpickles whatever else a folder has in their place."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse an entry.

        Args:
            read_item: Names it.
            value: Its content, which is not read.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(
            f"{read_item.dest_index.fqn} is no tensor in the folder, which is damaged or was tampered with; it was not "
            "loaded, because unpickling foreign objects can run any code. Use another checkpoint."
        )


def load_tensors(tensors: dict[str, Tensor], path: Path | str, *, alone: bool = True) -> None:
    """Read tensors from a folder, in place.

    Args:
        tensors: By the names that the folder has for them.
        path: The folder.
        alone: Without other ranks; otherwise all ranks take part, and each reads its shards.

    Raises:
        CheckpointError: If something cannot be read; on every rank that takes part.
    """
    reader = PlainReader(path) if alone else agreed(lambda: PlainReader(path))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it was asked for
            load(tensors, storage_reader=reader, planner=PlainLoadPlanner(), no_dist=alone)
    except CheckpointException as error:  # from one rank or several
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, CheckpointError):
            raise CheckpointError(str(cause)) from error
        where = "" if alone else f" by rank {rank}"
        raise CheckpointError(
            f"{path} cannot be read{where}: {str(cause).partition(chr(10))[0] or type(cause).__name__}. Use another "
            "checkpoint of the run."
        ) from error


def agreed(work: Callable[[], T]) -> T:
    """Do something on each rank; if it fails on one, no rank goes on to wait for it. Collective: call on all ranks.

    Args:
        work: Raises `CheckpointError` if it fails.

    Raises:
        CheckpointError: On all ranks, if it fails on one.
    """
    result, problem = None, None
    try:
        result = work()
    except CheckpointError as error:
        problem = str(error)
    problems: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(problems, problem)
    found = next((problem for problem in problems if problem is not None), None)
    if found is not None:
        raise CheckpointError(found)
    return cast(T, result)

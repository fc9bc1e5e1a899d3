"""Arrays of a task in a file, mapped into memory, so that looking a few documents up reads no whole shard."""

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.step import Arrays
from lightning_lm.storage import replacing

__all__ = ["LazyArrays", "write_arrays"]

_LOCAL_HEADER = 30
"""Bytes of a file's header in a ZIP archive before its name; the last four have the lengths of name and extra field."""


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays into a file, as a whole or not at all.

    Args:
        path: The file.
        arrays: Arrays by name.
    """
    with replacing(path) as file:
        np.savez(file, **dict(arrays))  # type: ignore[arg-type]


class LazyArrays(Mapping[str, NDArray[Any]]):
    """Arrays of a file, each mapped when it is looked up.

    Args:
        path: File of ``numpy.savez``, which stores arrays as they are.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with zipfile.ZipFile(path) as archive:
            self._names = [name.removesuffix(".npy") for name in archive.namelist()]

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        with zipfile.ZipFile(self._path) as archive, self._path.open("rb") as file:
            begin = archive.getinfo(f"{name}.npy").header_offset
            file.seek(begin + _LOCAL_HEADER - 4)
            file.seek(begin + _LOCAL_HEADER + sum(struct.unpack("<HH", file.read(4))))
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            order: Any = "F" if fortran else "C"
            if not math.prod(shape) * dtype.itemsize:
                return np.zeros(shape, dtype)
            return np.memmap(file, dtype, "r", file.tell(), shape, order)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

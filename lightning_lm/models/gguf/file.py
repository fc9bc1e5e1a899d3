"""One GGUF file: opened, checked, its metadata as plain values and its tensors dequantized one at a time.

The layout is parsed by the ``gguf`` package of llama.cpp. A damaged file must not pass for a whole one, so the end of
each tensor is compared with the size of the file before anything is read.
"""

import contextlib
import hashlib
import importlib
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lm.errors import CheckpointError, MissingDependencyError
from lightning_lm.storage import SWITCH, verifies

__all__ = ["DIGEST_KEY", "NO_DIGEST", "GGUFFile", "gguf_package", "put_digest"]

DIGEST_KEY = "lightning_lm.sha256"
"""Metadata of the files that this package writes: a SHA-256, see `put_digest`. Other programs pass over it."""
NO_DIGEST = "0" * 64
_MAGIC = b"GGUF"
_PIECE = 1 << 20
_DAMAGED = (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError, MemoryError)
"""Errors of the parser on a file that is cut, or was not written as the format says."""


class GGUFFile:
    """A GGUF file, mapped into memory.

    Args:
        path: The file.

    Attributes:
        metadata: Values by key, such as ``llama.block_count``.

    Raises:
        CheckpointError: If it is no whole GGUF file.
        MissingDependencyError: If the ``gguf`` package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        package = gguf_package(f"read {path.name}")
        with self._explained():
            with path.open("rb") as file:
                start = file.read(4)
            if start != _MAGIC:
                raise CheckpointError(f"{path} is no GGUF file: it begins with {start!r}, not {_MAGIC!r}.")
            _check_digest(path)
            reader = package.GGUFReader(path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        size = path.stat().st_size
        for tensor in reader.tensors:
            if int(tensor.data_offset) + int(tensor.n_bytes) > size:
                raise CheckpointError(f"{path} ends within the tensor {tensor.name}; fetch the file again.")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the tensors by name, in the order of torch: rows first."""
        return {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def kind(self, name: str) -> str:
        """Return the quantization type of a tensor, such as ``Q4_K``."""
        return str(self._tensors[name].tensor_type.name)

    def read(self, name: str) -> Tensor:
        """Return a tensor, dequantized, float32.

        Args:
            name: Its name in the file.

        Raises:
            CheckpointError: If no dequantization is known for its type.
        """
        tensor = self._tensors[name]
        dequantize = importlib.import_module("gguf.quants").dequantize
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: the tensor {name} has the type {tensor.tensor_type.name}, which this version of the "
                "gguf package cannot dequantize; use a file of another quantization, such as Q8_0 or Q4_K_M."
            ) from error
        return torch.from_numpy(values.astype("float32", copy=True)).reshape(self.shapes[name])

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        except _DAMAGED as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"{self.path} is no whole GGUF file of a known version ({reason}); fetch the file again."
            ) from error


def put_digest(path: Path) -> None:
    """Put the digest of a new file in the place that its metadata have for it.

    Args:
        path: A file that was written with ``NO_DIGEST`` as the value of ``DIGEST_KEY``.
    """
    digest, place, _ = _digest_of(path)
    assert place is not None
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def _check_digest(path: Path) -> None:
    """Refuse a file that has changed since this package wrote it; those of other programs have no digest."""
    if not verifies():
        return
    digest, place, written = _digest_of(path)
    if place is not None and written != digest:
        raise CheckpointError(
            f"{path} has changed since it was written: its SHA-256 is not the {DIGEST_KEY} in its metadata. Write it "
            f"again, or copy it from a place where it is intact; {SWITCH}=0 in the environment reads it as it is."
        )


def _digest_of(path: Path) -> tuple[str, int | None, str]:
    """Return the SHA-256 of a file, its own digest taken as zeros, the place of that digest, and what stands there."""
    key, length = DIGEST_KEY.encode(), len(NO_DIGEST)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # Key, type of the value (4 bytes), length of the text (8 bytes), text.
        found = content.find(len(key).to_bytes(8, "little") + key)
        if found < 0:
            return "", None, ""
        place = found + 8 + len(key) + 12
        digest = hashlib.sha256(NO_DIGEST.encode())
        for begin, end in ((0, place), (place + length, len(content))):
            for start in range(begin, end, _PIECE):
                digest.update(content[start : min(end, start + _PIECE)])
        return digest.hexdigest(), place, content[place : place + length].decode("ascii", "replace")


def gguf_package(purpose: str) -> Any:
    """Return the ``gguf`` package.

    Args:
        purpose: End of "... is needed to".

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("gguf", purpose, "gguf") from error

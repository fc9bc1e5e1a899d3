"""One GGUF file: opened, checked, its metadata as plain values and its tensors dequantized one at a time.

The layout is parsed by the ``gguf`` package of llama.cpp. A damaged file must not pass for a whole one, so the end of
each tensor is compared with the size of the file before anything is read.
"""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lm.errors import CheckpointError, MissingDependencyError

__all__ = ["GGUFFile", "gguf_package"]

_MAGIC = b"GGUF"
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

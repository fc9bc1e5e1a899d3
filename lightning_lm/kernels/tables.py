"""Launch settings of the kernels: looked up, never measured while a model trains.

Measuring at run time needs a driver, spends live data, and may end differently on every rank. The table that comes with
the package is a list of entries in ``tables.json``; what is not in it is launched by the rule of its kernel.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_lm.kernels.backend import architecture
from lightning_lm.kernels.launch import triton_version

__all__ = ["entry_key", "settings"]

TABLE = Path(__file__).with_name("tables.json")


def settings(
    operation: str, dims: tuple[int, ...], dtype: torch.dtype, *, device: torch.device, default: Mapping[str, int]
) -> dict[str, int]:
    """Return the launch settings of a kernel: its own, overridden by the table where that has an entry.

    Args:
        operation: Name of the kernel.
        dims: The sizes that its speed depends on.
        dtype: Of its main operand.
        device: Where it runs.
        default: What its rule says.
    """
    key = entry_key(operation, dims, dtype, architecture=architecture(device), triton=triton_version())
    return {**default, **_table().get(key, {})}


def entry_key(operation: str, dims: tuple[int, ...], dtype: torch.dtype, *, architecture: str, triton: str) -> str:
    """Return the name of an entry.

    Args:
        operation: Name of the kernel.
        dims: The sizes that its speed depends on.
        dtype: Of its main operand.
        architecture: Such as ``sm_90``.
        triton: Version of Triton to the minor.

    Example:
        >>> entry_key("rms_norm", (4096,), torch.bfloat16, architecture="sm_90", triton="3.9")
        'rms_norm 4096 bfloat16 sm_90 triton-3.9'
    """
    sizes = "x".join(map(str, dims))
    return f"{operation} {sizes} {str(dtype).removeprefix('torch.')} {architecture} triton-{triton}"


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return entries

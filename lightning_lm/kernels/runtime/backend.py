"""Choice of the implementation of an operation, with its reason: Triton if possible, else torch."""

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.kernels.runtime import launch

__all__ = [
    "FLOATS",
    "Choice",
    "architecture",
    "choices",
    "force_backend",
    "forced_backend",
    "report",
    "unavailable",
    "unsupported_dtype",
    "use_triton",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""The types that kernels read and write; they compute in float32."""
_OLDEST = (8, 0)
"""Compute capability of the oldest GPU with bfloat16 products."""
_forced: list[str] = []  # not a context variable: gradients run in threads of their own
_operations: dict[str, str | None] = {}
"""Every operation, and why its last call did not run in Triton; ``""`` before the first call."""
_functions: dict[str, str] = {}
"""Names that users know an operation by."""


class Choice(NamedTuple):
    """Implementation of an operation."""

    operation: str
    backend: Literal["triton", "torch"]
    reason: str
    """Reason why it is not Triton; empty if it is."""


def unavailable(device: torch.device | str) -> str | None:
    """Return why no Triton kernel can run on a device, or nothing if they can.

    Args:
        device: Device of the tensors.
    """
    device = torch.device(device)
    if not launch.is_installed():
        return "Triton is not installed (pip install triton, Linux only)"
    if _forced[-1:] == ["triton"] and launch.interpreted():
        return None
    if device.type != "cuda":
        return f"tensors on {device.type}; Triton kernels need a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below {_OLDEST[0]}.{_OLDEST[1]}"
    return None


def use_triton(operation: str, device: torch.device, unsupported: str | None) -> bool:
    """Return whether an operation runs in Triton, and remember why not for `report`.

    Args:
        operation: Its name.
        device: Device of its tensors.
        unsupported: Reason why its kernels do not support these arguments, if they do not.

    Raises:
        ConfigurationError: If Triton is forced by `force_backend` and cannot be used.
    """
    forced = _forced[-1] if _forced else None
    reason = _operations[operation] = "torch was forced" if forced == "torch" else unavailable(device) or unsupported
    if forced == "triton" and reason is not None:
        raise ConfigurationError(f"{operation} was forced to run in Triton and cannot: {reason}.")
    return reason is None


def unsupported_dtype(x: Tensor) -> str | None:
    """Return why kernels cannot read a type, or nothing if they can.

    Args:
        x: The tensor.
    """
    return None if x.dtype in FLOATS else f"{x.dtype} is none of float32, float16 and bfloat16"


@contextlib.contextmanager
def force_backend(backend: Literal["triton", "torch"]) -> Iterator[None]:
    """Run all operations of this package by one implementation, to compare or to debug.

    With ``TRITON_INTERPRET=1`` in the environment from the start, Triton can be forced without a GPU.

    Args:
        backend: ``triton`` raises where a kernel cannot run instead of falling back.

    Raises:
        ConfigurationError: Inside, where Triton is forced and cannot be used.
    """
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def forced_backend() -> str | None:
    """Return the implementation that `force_backend` asks for, or nothing."""
    return _forced[-1] if _forced else None


def register(operation: str, *, functions: Sequence[str] = ()) -> None:
    """List an operation in the report.

    Args:
        operation: Its name.
        functions: The public functions that run it, where they are called otherwise.
    """
    _operations.setdefault(operation, "")
    if functions:
        _functions[operation] = ", ".join(functions)


def choices(device: torch.device | str | None = None) -> list[Choice]:
    """Return for every operation what runs it; after a call, what ran that call.

    Args:
        device: Device of the tensors; by default the first CUDA device, or else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = unavailable(device)
    last = {name: reason if reason != "" else missing for name, reason in _operations.items()}
    return [Choice(name, "torch" if last[name] else "triton", last[name] or "") for name in sorted(last)]


def report(device: torch.device | str | None = None) -> None:
    """Print which implementation runs each operation, and why where it is not Triton.

    Args:
        device: Device of the tensors; by default the first CUDA device, or else the CPU.
    """
    lines = [f"{'operation':<35}{'back-end':<10}why not Triton"]
    for name, backend, reason in choices(device):
        known = f"{name} ({_functions[name]})" if name in _functions else name
        lines.append(f"{known:<35}{backend:<10}{reason or '-'}")
    sys.stdout.write("\n".join(lines) + "\n")


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the architecture that tables are kept for, such as ``"sm_90"``; ``"none"`` without a GPU.

    Args:
        device: Device on which the kernel runs.
    """
    if device.type != "cuda":
        return "none"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"

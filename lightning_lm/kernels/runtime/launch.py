"""Triton, loaded at the first launch: writing a kernel down costs nothing where none will run."""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Kernel", "interpreted", "is_installed", "jit", "launch", "next_power_of_two", "triton_version"]


class Kernel:
    """A function in Triton's language that becomes a `triton.jit` function when it is first needed.

    Its module names `tl` only for type checkers; the first use puts the real module there, and the compiled form of
    every kernel in place of the kernels it calls.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __call__(self, *_: Any) -> Any:
        """Refuse: kernels are run by `launch`, and call each other only once compiled."""
        raise TypeError(f"{self.__name__} is a kernel; run it by launch(kernel, grid, ...).")

    @functools.cached_property
    def compiled(self) -> Any:
        """The `triton.jit` function."""
        import triton
        import triton.language as tl

        names = self.function.__globals__
        names["tl"] = tl
        compiled = triton.jit(self.function)
        called = self.function.__code__.co_names
        names.update({name: names[name].compiled for name in called if isinstance(names.get(name), Kernel)})
        return compiled


def jit(function: Callable[..., Any]) -> Kernel:
    """Mark a function as a Triton kernel, or as a part of one.

    Args:
        function: A function in Triton's language; it may call others that are marked so.
    """
    return Kernel(function)


def launch(kernel: Kernel, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its first tensor; an empty grid does nothing.

    Args:
        kernel: Kernel to run.
        grid: Number of programs along each axis.
        *arguments: Its arguments.
        **options: Its constants by name, and ``num_warps`` or ``num_stages``.
    """
    if 0 in grid:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    options = {"enable_fp_fusion": True, **options}  # the default differs between Triton's versions
    if device.type != "cuda":
        kernel.compiled[tuple(grid)](*arguments, **options)
        return
    with torch.cuda.device(device):
        kernel.compiled[tuple(grid)](*arguments, **options)


@functools.cache
def is_installed() -> bool:
    """Return whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether Triton's interpreter stands in for a GPU, which `TRITON_INTERPRET=1` asks for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_version() -> str:
    """Return the version of Triton to the minor, such as ``"3.9"``; nothing without it."""
    if not is_installed():
        return ""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a number.

    Args:
        number: At least 1.

    Example:
        >>> next_power_of_two(768)
        1024
    """
    return 1 << (number - 1).bit_length()

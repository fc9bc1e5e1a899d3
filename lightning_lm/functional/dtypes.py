"""Number formats of accumulations."""

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "at_least_float32", "to_accumulate"]


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the type for sums over many elements: float64, or float32 on Apple's GPUs, which have no float64.

    Args:
        device: Device of the sum.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def to_accumulate(tensor: Tensor) -> Tensor:
    """Return a tensor in the type for sums over many elements, on its device.

    Args:
        tensor: Any float type.
    """
    return tensor.to(accumulation_dtype(tensor.device))


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is in float64: the precision of intermediate results.

    Args:
        tensor: Any float type.
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()

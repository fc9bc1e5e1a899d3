"""Number formats of accumulations."""

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "to_accumulate"]


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

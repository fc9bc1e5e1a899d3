"""Using a model between two training steps without leaving a trace: modes, gradients and random numbers stay."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["set_aside"]


@contextmanager
def set_aside(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Switch a module to evaluation, and give back its modes and the random state afterwards, bit for bit.

    Args:
        module: Each of its submodules gets back its own mode, so a frozen part stays in evaluation.
        device: Where it computes; the global generators of this device and of the CPU are kept.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for part, training in modes.items():
            part.training = training

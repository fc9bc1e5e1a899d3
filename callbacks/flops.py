"""Training FLOPs per token of any module: from the weights of a language model, by counting one row for others.

Divided by the peak dense matrix FLOP/s of a chip, they give the model FLOPs utilization (MFU).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_lm.callbacks.hooks import Attempt, without_side_effects
from lightning_lm.models.summary import flops_per_token
from lightning_lm.modules import LMModule
from lightning_lm.protocols import LanguageModel
from lightning_lm.scaling.gpus import GPUS, Gpu

__all__ = ["peak_flops_per_s", "training_flops_per_token"]

_TRAINING_OVER_FORWARD = 3  # the backward pass multiplies each matrix twice: by the gradient, for input and for weight


def training_flops_per_token(pl_module: LightningModule, context_length: int) -> float | None:
    """Return the FLOPs that training takes per token of a row; see `lightning_lm.models.summary.flops_per_token`.

    ``None`` for a module that takes no token ids, such as one for images: its FLOPs are not counted.

    Args:
        pl_module: Counted from the weights of its ``model`` if that is a `LanguageModel`, otherwise by running its
            ``forward`` on one row of zeros, or from its weights if it has an embedding and takes more than ids.
        context_length: Tokens in a row, which decides the fraction of attention.
    """
    model = getattr(pl_module, "model", None)
    if isinstance(model, LanguageModel):
        return flops_per_token(model, context_length)  # type: ignore[arg-type]
    forward = model if isinstance(pl_module, LMModule) and isinstance(model, nn.Module) else pl_module
    counted = _count_by_running(pl_module, forward, context_length)
    if counted:
        return counted
    of_tokens = any(isinstance(part, nn.Embedding) for part in pl_module.modules())
    return flops_per_token(pl_module, context_length) if of_tokens else None


def _count_by_running(pl_module: LightningModule, forward: Callable[[Any], Any], context_length: int) -> float | None:
    """Run one row; ``None`` if that fails."""
    row = torch.zeros(1, context_length, dtype=torch.int64, device=pl_module.device)
    counter = FlopCounterMode(display=False)
    with without_side_effects(pl_module, pl_module.device), _unfused(), counter, Attempt() as attempt:
        forward(row)
    if attempt.error is not None:
        return None
    return _TRAINING_OVER_FORWARD * counter.get_total_flops() / context_length


@contextmanager
def _unfused() -> Iterator[None]:
    """Let torch compute as its matrix products what it fuses otherwise, which `FlopCounterMode` would not see.

    These are the attention kernels, the inference path of `nn.MultiheadAttention` and `nn.TransformerEncoder`, the
    recurrent layers of cuDNN and oneDNN, and compiled parts.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=False),
            torch.backends.mkldnn.flags(enabled=False),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def peak_flops_per_s(device: torch.device, precision: str) -> float | None:
    """Return the dense matrix FLOP/s that a device's data sheet promises, or ``None`` where it is not known.

    Args:
        device: The training device; only CUDA and ROCm devices are in the table.
        precision: A name as ``trainer.precision`` has it, such as ``bf16-mixed`` or ``32-true``.
    """
    if device.type != "cuda" or precision.startswith("64"):
        return None
    gpu = _of_chip(torch.cuda.get_device_name(device))
    if gpu is None:
        return None
    if "16" in precision:
        return gpu.half_flops_per_s
    return gpu.single_flops_per_s if torch.get_float32_matmul_precision() == "highest" else gpu.tf32_flops_per_s


def _of_chip(name: str) -> Gpu | None:
    fits = (gpu for chip, gpu in GPUS.items() if re.search(rf"\b{chip}\b(?! (Ti|D|Laptop|SUPER))", name))
    return next(fits, None)

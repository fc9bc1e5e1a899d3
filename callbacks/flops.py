"""Training FLOPs per token of any module: from the weights of a language model, by counting one row for others."""

import torch
from lightning.pytorch import LightningModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_lm.callbacks.aside import set_aside
from lightning_lm.models.summary import flops_per_token
from lightning_lm.protocols import LanguageModel

__all__ = ["training_flops_per_token"]

_NOT_FOR_IDS = (TypeError, IndexError, KeyError, AttributeError, NotImplementedError)
"""What a forward raises that is made for a batch, or for more than one argument, or that is not there at all."""
_TRAINING_OVER_FORWARD = 3  # the backward pass multiplies each matrix twice: by the gradient, for input and for weight


def training_flops_per_token(pl_module: LightningModule, context_length: int) -> float:
    """Return the FLOPs that training takes per token of a row; see `lightning_lm.models.summary.flops_per_token`.

    Args:
        pl_module: Counted from the weights of its ``model`` if that is a `LanguageModel`, otherwise by running its
            ``forward`` on one row of zeros, or from its weights where that takes anything but ids.
        context_length: Tokens in a row, which decides the share of attention.
    """
    model = getattr(pl_module, "model", None)
    if isinstance(model, LanguageModel):
        return flops_per_token(model, context_length)  # type: ignore[arg-type]
    return _count_by_running(pl_module, context_length)


def _count_by_running(pl_module: LightningModule, context_length: int) -> float:
    """Run one row; fused attention counts as its two matrix products, and compiled parts run as they are written."""
    row = torch.zeros(1, context_length, dtype=torch.int64, device=pl_module.device)
    counter = FlopCounterMode(display=False)
    with (
        set_aside(pl_module, pl_module.device),
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
        counter,
    ):
        try:
            pl_module(row)
        except _NOT_FOR_IDS:
            return flops_per_token(pl_module, context_length)
    return _TRAINING_OVER_FORWARD * counter.get_total_flops() / context_length

"""Cross-entropy of logits that are there already: one pass forward, one backward, no synchronisation with the host."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.functional.dtypes import accumulation_dtype
from lightning_lm.kernels.lm_head.logits import Logits, Normaliser, gradient, loss_coefficients, row_losses, statistics
from lightning_lm.kernels.runtime.operation import Operation
from lightning_lm.kernels.runtime.rows import rows_of
from lightning_lm.types import IGNORE_INDEX

__all__ = ["cross_entropy"]


def cross_entropy(
    logits: Float[Tensor, "*rows vocab"],
    targets: Int[Tensor, "*rows"],
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    weights: Float[Tensor, "*rows"] | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> TokenLoss:
    """Sum the cross-entropy of logits over the target tokens, in float32 or better.

    Args:
        logits: Scores of every token id; any float type.
        targets: Token ids, or `ignore_index` for positions without a target.
        softcap: Replace the logits by ``softcap * tanh(logits / softcap)``.
        z_loss: Weight of the squared log-normaliser. Unitless.
        label_smoothing: Fraction of the target spread evenly over the vocabulary. Unitless.
        weights: Multiply the loss of each token; the count and the plain likelihoods stay as they are.
        ignore_index: Label of positions that count for nothing.

    Source:
        Milakov and Gimelshein 2018, arXiv:1805.02867 (softmax in one pass); Chowdhery et al. 2022, arXiv:2204.02311,
        section 5 (z-loss).
    """
    flat = targets.reshape(-1)
    losses, nll = _operation(rows_of(logits), flat, softcap, z_loss, label_smoothing, ignore_index)
    losses = losses if weights is None else losses * weights.reshape(-1)
    nll_sum = nll.detach().sum(dtype=accumulation_dtype(logits.device))
    return TokenLoss(losses.sum(), nll_sum, (flat != ignore_index).sum())


def _cross_entropy_forward(logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, ...]:
    softcap, z_loss, label_smoothing, ignore_index = options
    rows = Logits(logits, targets, softcap=softcap, ignore_index=ignore_index)
    found = statistics(rows, "cross_entropy", averaged=label_smoothing > 0)
    return row_losses(found, z_loss, label_smoothing), found.nll, *(part.clone() for part in found.normaliser)


def _cross_entropy_backward(
    grad: Tensor | None, grad_nll: Any, logits: Tensor, targets: Tensor, peak: Tensor, log_total: Tensor, *options: Any
) -> tuple[Tensor]:
    normaliser = Normaliser(peak, log_total)
    softcap, z_loss, label_smoothing, ignore_index = options
    rows = Logits(logits, targets, softcap=softcap, ignore_index=ignore_index)
    upstream = torch.zeros_like(peak) if grad is None else grad.contiguous()
    terms = {"z_loss": z_loss, "label_smoothing": label_smoothing}
    coefficients = loss_coefficients(normaliser.value, upstream, logits.size(1), **terms)
    return (gradient(rows, normaliser, coefficients, "cross_entropy", out=logits.new_empty(logits.shape)),)


def _fake_forward(logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(logits.size(0), dtype=dtype) for _ in range(4))


def _fake_backward(grad: Any, grad_nll: Any, logits: Tensor, *rest: Any) -> tuple[Tensor]:
    return (logits.new_empty(logits.shape),)


_operation = Operation(
    _cross_entropy_forward,
    _cross_entropy_backward,
    schema="(Tensor logits, Tensor targets, float? softcap, float z_loss, float label_smoothing, int ignore_index)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backward_schema="(Tensor? grad, Tensor? grad_nll, Tensor logits, Tensor targets, Tensor peak,"
    " Tensor log_total, float? softcap, float z_loss, float label_smoothing, int ignore_index) -> Tensor",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda tensors, results: (*tensors, *results[2:]),
    arrange=lambda grad_logits: (grad_logits, None),
    visible=2,
)

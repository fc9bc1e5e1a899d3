"""Token cross-entropy as sums with counts.

This is the formula, from logits. `lightning_lm.kernels` computes it straight from features, without ever holding all
logits, in one sweep with the gradients.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.functional.dtypes import accumulation_dtype
from lightning_lm.functional.shapes import require_aligned
from lightning_lm.types import IGNORE_INDEX

__all__ = ["MeasuredLoss", "TokenLoss", "token_cross_entropy"]


class TokenLoss(NamedTuple):
    """Sums over the target tokens of a batch; divide once, after all batches and ranks are added up."""

    loss_sum: Float[Tensor, ""]
    """Training loss, differentiable: cross-entropy with label smoothing and z-loss. Nats."""
    nll_sum: Float[Tensor, ""]
    """Plain negative log-likelihood, detached, in float64 where the device has it. Nats."""
    num_tokens: Int[Tensor, ""]
    """Number of target tokens."""


class MeasuredLoss(NamedTuple):
    """A `TokenLoss`, and what else can be told from the logits while they are there."""

    loss: TokenLoss
    entropy_sum: Float[Tensor, ""]
    """Entropies of the predictions of all target tokens, detached. Nats."""
    num_correct: Float[Tensor, ""]
    """Number of target tokens that were the likeliest."""


def token_cross_entropy(
    logits: Float[Tensor, "*rows vocab"],
    targets: Int[Tensor, "*rows"],
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    by_confidence: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> TokenLoss:
    """Sum the cross-entropy of logits over the target tokens, in float32 or better.

    Args:
        logits: Scores of every token id; any float type.
        targets: Token ids, or `ignore_index` for positions without a target.
        z_loss: Weight of the squared log-normaliser. Unitless.
        label_smoothing: Fraction of the target spread evenly over the vocabulary. Unitless.
        by_confidence: Multiply each token's loss by its probability, which is taken as a constant.
        ignore_index: Label of positions that count for nothing.

    Source:
        Chowdhery et al. 2022, arXiv:2204.02311, section 5 (z-loss); Szegedy et al. 2015, arXiv:1512.00567, section 7
        (label smoothing); Wu et al. 2025, arXiv:2508.05629 (weighting by confidence).
    """
    require_aligned(logits=logits, targets=targets)
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    valid = targets.reshape(-1) != ignore_index
    labels = torch.where(valid, targets.reshape(-1), 0)
    log_normaliser = flat.logsumexp(dim=-1)
    nll = log_normaliser - flat.gather(1, labels[:, None]).squeeze(1)
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (log_normaliser - flat.mean(dim=-1))
    if z_loss:
        loss = loss + z_loss * log_normaliser.square()
    if by_confidence:
        loss = loss * nll.detach().neg().exp()
    # `where` and not a product: an ignored row may hold anything, inf and NaN included.
    loss_sum = torch.where(valid, loss, 0).sum()
    nll_sum = torch.where(valid, nll, 0).sum(dtype=accumulation_dtype(logits.device))
    return TokenLoss(loss_sum, nll_sum.detach(), valid.sum())

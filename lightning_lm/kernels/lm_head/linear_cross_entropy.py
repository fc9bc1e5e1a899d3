"""Fused output layer and cross-entropy: loss and gradients in one sweep over chunks of logits, never all of them."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.functional.cross_entropy import MeasuredLoss, TokenLoss
from lightning_lm.functional.dtypes import accumulation_dtype
from lightning_lm.kernels.lm_head.head import (
    INPUTS,
    OPTIONS,
    Head,
    HeadGradients,
    empty_gradients,
    matmul_flops,
    open_head,
)
from lightning_lm.kernels.lm_head.logits import loss_coefficients, row_losses
from lightning_lm.kernels.runtime.flop_formulas import flop_formula
from lightning_lm.kernels.runtime.operation import Operation
from lightning_lm.types import IGNORE_INDEX

__all__ = ["linear_cross_entropy", "measured_cross_entropy"]


def linear_cross_entropy(
    hidden: Float[Tensor, "*rows d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, "*rows"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    budget_bytes: int | None = None,
) -> TokenLoss:
    """Sum the cross-entropy of ``hidden @ weight.T`` over the target tokens without holding all logits.

    The gradients are computed along with the loss; that of the weight is added up in float32, and the upstream gradient
    is multiplied in at the end. Under autocast the matmuls run in its type. If the rows of the weight are sharded over
    ranks (tensor parallelism), each computes the logits of its own ids, and the result is the same on all.

    Args:
        hidden: Hidden states of each position.
        weight: One row per token id.
        targets: Token ids, or ``IGNORE_INDEX`` for positions without a target.
        bias: Added to the logits.
        softcap: Replace the logits by ``softcap * tanh(logits / softcap)``.
        z_loss: Weight of the squared log-normaliser. Unitless.
        label_smoothing: Fraction of the target spread evenly over the vocabulary. Unitless.
        budget_bytes: Size of a chunk of logits with all temporary matrices; at least one row. By default 512 MiB on a
            GPU and 40 MiB on a CPU, or more if 256 rows of a large vocabulary need more.

    Source:
        Wijmans et al. 2024, arXiv:2411.09009, and Hsu et al. 2024, arXiv:2410.10989 (losses without all logits);
        Chowdhery et al. 2022, arXiv:2204.02311, section 5 (z-loss); Szegedy et al. 2015, arXiv:1512.00567, section 7
        (label smoothing); Gemma Team 2024, arXiv:2408.00118, section 2 (soft-cap).
    """
    head = open_head(hidden, weight, bias, targets, softcap=softcap, budget_bytes=budget_bytes)
    loss, sums = _operation(*head, z_loss, label_smoothing, False)
    return TokenLoss(loss, sums[0].detach(), (head.targets != IGNORE_INDEX).sum())


def measured_cross_entropy(
    hidden: Float[Tensor, "rows d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, " rows"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    by_confidence: bool = False,
) -> MeasuredLoss:
    """Sum cross-entropies as `linear_cross_entropy` does, and entropies and correct predictions from the same logits.

    Args:
        hidden: Hidden states of each position.
        weight: One row per token id.
        targets: Token ids, or ``IGNORE_INDEX`` for positions without a target.
        bias: Added to the logits.
        softcap: Replace the logits by ``softcap * tanh(logits / softcap)``.
        z_loss: Weight of the squared log-normaliser. Unitless.
        label_smoothing: Fraction of the target spread evenly over the vocabulary. Unitless.
        by_confidence: Multiply each token's loss by its probability, which is taken as a constant.

    Source:
        Wu et al. 2025, arXiv:2508.05629 (weighting by confidence).
    """
    head = open_head(hidden, weight, bias, targets, softcap=softcap, measured=True)
    loss, sums = _operation(*head, z_loss, label_smoothing, by_confidence)
    nll_sum, entropy_sum, num_correct = sums.detach().unbind()
    return MeasuredLoss(TokenLoss(loss, nll_sum, (head.targets != IGNORE_INDEX).sum()), entropy_sum, num_correct)


def _linear_cross_entropy_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *of_head, z_loss, label_smoothing, by_confidence = arguments
    head, name = Head(*of_head).cast(), "linear_cross_entropy"
    sums = torch.zeros(4, dtype=accumulation_dtype(head.hidden.device), device=head.hidden.device)
    gradients = HeadGradients(head)
    for rows, logits in head.chunks(name):
        found = head.statistics(logits, name, averaged=label_smoothing > 0)
        weights = found.nll.neg().exp() if by_confidence else torch.ones_like(found.nll)
        losses = weights * row_losses(found, z_loss, label_smoothing)
        sums += torch.stack((losses, found.nll, found.entropy, found.correct)).sum(dim=1, dtype=sums.dtype)
        if any(head.needs):
            terms = {"z_loss": z_loss, "label_smoothing": label_smoothing}
            coefficients = loss_coefficients(found.normaliser.value, weights, head.num_ids, **terms)
            gradients.add(rows, head.gradient(logits, found.normaliser, coefficients, name))
        del logits  # before the next chunk is made
    loss = sums[0].clone().to(torch.promote_types(arguments[0].dtype, torch.float32))
    return loss, sums[1:].clone(), gradients.hidden, gradients.weight, gradients.bias


def _linear_cross_entropy_backward(
    grad: Tensor | None, grad_sums: Any, hidden: Tensor, weight: Tensor, bias: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    """Multiply the gradients that the forward pass has computed by the upstream gradient."""
    gradients = hidden, weight, bias
    if grad is None:
        return tuple(torch.zeros_like(part) for part in gradients)
    return tuple(part * grad.to(torch.promote_types(part.dtype, torch.float32)) for part in gradients)


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *of_head, _, _, _ = arguments
    head = Head(*of_head)
    loss = head.hidden.new_empty((), dtype=torch.promote_types(head.hidden.dtype, torch.float32))
    return loss, head.hidden.new_empty(3, dtype=accumulation_dtype(head.hidden.device)), *empty_gradients(head)


def _fake_backward(grad: Any, grad_sums: Any, hidden: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> Any:
    return torch.empty_like(hidden), torch.empty_like(weight), torch.empty_like(bias)


_TERMS = "float z_loss, float label_smoothing, bool by_confidence"
_operation = Operation(
    _linear_cross_entropy_forward,
    _linear_cross_entropy_backward,
    schema=f"({INPUTS}, {OPTIONS}, {_TERMS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_schema="(Tensor? grad, Tensor? grad_sums, Tensor hidden, Tensor weight, Tensor bias,"
    f" {OPTIONS}, {_TERMS}) -> (Tensor, Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda _, results: results[2:],
    visible=2,
)


@flop_formula(torch.ops.lightning_lm.linear_cross_entropy)
def _flops(*arguments: Any, **_: Any) -> int:
    """Count one matmul for the logits and one for each gradient, which are computed in the forward pass."""
    *of_head, _, _, _ = arguments
    return matmul_flops(Head(*of_head))

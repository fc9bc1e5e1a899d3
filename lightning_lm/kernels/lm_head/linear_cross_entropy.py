"""Output head and cross-entropy together: loss and gradients in one sweep, and never all logits."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.functional.cross_entropy import MeasuredLoss, TokenLoss
from lightning_lm.functional.dtypes import accumulation_dtype
from lightning_lm.kernels.lm_head.cross_entropy import loss_coefficients, row_losses
from lightning_lm.kernels.lm_head.head import INPUTS, OPTIONS, Head, HeadGradients, empty_gradients, open_head
from lightning_lm.kernels.runtime.flop_formulas import flop_formula
from lightning_lm.kernels.runtime.operation import Operation
from lightning_lm.types import IGNORE_INDEX

__all__ = ["linear_cross_entropy", "measured_cross_entropy"]


class _Terms(NamedTuple):
    """The last arguments of the operation, after those of the head."""

    z_loss: float
    label_smoothing: float
    by_confidence: bool


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
    is multiplied in at the end. Under autocast the products run in its type. Where ranks share the rows of the weight
    (tensor parallelism) each computes the logits of its own ids, and the result is the same on all.

    Args:
        hidden: Features of each position.
        weight: One row per token id.
        targets: Token ids, or ``IGNORE_INDEX`` where nothing is learned.
        bias: Added to the logits.
        softcap: Replace the logits by ``softcap * tanh(logits / softcap)``.
        z_loss: Weight of the squared log-normaliser. Unitless.
        label_smoothing: Share of the target spread evenly over the vocabulary. Unitless.
        budget_bytes: Logits held at once, with all that is made of them; at least one row is. By default 512 MiB on a
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
        hidden: Features of each position.
        weight: One row per token id.
        targets: Token ids, or ``IGNORE_INDEX`` where nothing is learned.
        bias: Added to the logits.
        softcap: Replace the logits by ``softcap * tanh(logits / softcap)``.
        z_loss: Weight of the squared log-normaliser. Unitless.
        label_smoothing: Share of the target spread evenly over the vocabulary. Unitless.
        by_confidence: Multiply each token's loss by its probability, which is taken as a constant.

    Source:
        Wu et al. 2025, arXiv:2508.05629 (weighting by confidence).
    """
    head = open_head(hidden, weight, bias, targets, softcap=softcap, measured=True)
    loss, sums = _operation(*head, z_loss, label_smoothing, by_confidence)
    nll_sum, entropy_sum, num_correct = sums.detach().unbind()
    return MeasuredLoss(TokenLoss(loss, nll_sum, (head.targets != IGNORE_INDEX).sum()), entropy_sum, num_correct)


def _linear_cross_entropy_forward(*arguments: Any) -> tuple[Tensor, ...]:
    (head, terms), name = _parted(*arguments), "linear_cross_entropy"
    head, (z_loss, label_smoothing, by_confidence) = head.cast(), terms
    sums = torch.zeros(4, dtype=accumulation_dtype(head.hidden.device), device=head.hidden.device)
    gradients = HeadGradients(head)
    for rows, logits in head.pieces(name):
        found = head.statistics(logits, name, averaged=label_smoothing > 0)
        weights = found.nll.neg().exp() if by_confidence else torch.ones_like(found.nll)
        losses = weights * row_losses(found, z_loss, label_smoothing)
        sums += torch.stack((losses, found.nll, found.entropy, found.correct)).sum(dim=1, dtype=sums.dtype)
        if any(head.needs):
            coefficients = loss_coefficients(
                found.normaliser.value, weights, head.num_ids, z_loss=z_loss, label_smoothing=label_smoothing
            )
            gradients.add(rows, head.gradient(logits, found.normaliser, coefficients, name))
        del logits  # before the next piece is made
    loss = sums[0].clone().to(torch.promote_types(arguments[0].dtype, torch.float32))
    return loss, sums[1:].clone(), gradients.hidden, gradients.weight, gradients.bias


def _linear_cross_entropy_backward(grad: Tensor | None, grad_sums: Any, *gradients_and_options: Any) -> Any:
    gradients: tuple[Tensor, ...] = gradients_and_options[:3]
    if grad is None:
        return tuple(torch.zeros_like(part) for part in gradients)
    return tuple(part * grad.to(torch.promote_types(part.dtype, torch.float32)) for part in gradients)


def _parted(*arguments: Any) -> tuple[Head, _Terms]:
    return Head(*arguments[:-3]), _Terms(*arguments[-3:])


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    hidden = arguments[0]
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, hidden.new_empty(3, dtype=accumulation_dtype(hidden.device)), *empty_gradients(_parted(*arguments)[0])


def _fake_backward(grad: Any, grad_sums: Any, *gradients_and_options: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(part) for part in gradients_and_options[:3])


_TERMS = "float z_loss, float label_smoothing, bool by_confidence"
_operation = Operation(
    _linear_cross_entropy_forward,
    _linear_cross_entropy_backward,
    schema=f"({INPUTS}, {OPTIONS}, {_TERMS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_schema="(Tensor? grad, Tensor? grad_sums, Tensor of_hidden, Tensor of_weight, Tensor of_bias,"
    f" {OPTIONS}, {_TERMS}) -> (Tensor, Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda _, results: results[2:],
    visible=2,
)


@flop_formula(torch.ops.lightning_lm.linear_cross_entropy)
def _flops(*arguments: Any, **_: Any) -> int:
    """Count one product for the logits and one for each gradient, which are made in the forward pass."""
    head = _parted(*arguments)[0]
    products = 1 + sum(head.needs[:2])
    return int(2 * head.hidden[0] * head.hidden[1] * head.weight[0] * products)

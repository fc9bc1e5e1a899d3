"""Output head and cross-entropy together: loss and gradients in one sweep, and never all logits."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.functional.cross_entropy import MeasuredLoss, TokenLoss
from lightning_lm.functional.cross_entropy import linear_cross_entropy as split_linear_cross_entropy
from lightning_lm.functional.cross_entropy import measured_cross_entropy as split_measured_cross_entropy
from lightning_lm.functional.vocab_parallel import is_split
from lightning_lm.kernels.backend import use_triton
from lightning_lm.kernels.cross_entropy import loss_coefficients, row_losses
from lightning_lm.kernels.flops import flop_formula
from lightning_lm.kernels.head import Head, HeadGradients, autocast_dtype, default_budget, row_chunks
from lightning_lm.kernels.operation import Operation
from lightning_lm.kernels.vocabulary import gradient, statistics, supported
from lightning_lm.types import IGNORE_INDEX

__all__ = ["linear_cross_entropy", "measured_cross_entropy", "supported"]


class _Options(NamedTuple):
    """What follows the tensors in the operation's arguments."""

    softcap: float | None
    z_loss: float
    label_smoothing: float
    by_confidence: bool
    measured: bool
    ignore_index: int
    budget: int
    dtype: torch.dtype
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool


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
    is multiplied in at the end. Under autocast the products run in its type.

    Args:
        hidden: Features of each position.
        weight: One row per token id.
        targets: Token ids, or ``IGNORE_INDEX`` where nothing is learned.
        bias: Added to the logits.
        softcap: Replace the logits by ``softcap * tanh(logits / softcap)``.
        z_loss: Weight of the squared log-normaliser. Unitless.
        label_smoothing: Share of the target spread evenly over the vocabulary. Unitless.
        budget_bytes: Logits held at once, with all that is made of them; at least one row is. By default 512 MiB on a
            GPU and 56 MiB on a CPU.

    Source:
        Wijmans et al. 2024, arXiv:2411.09009, and Hsu et al. 2024, arXiv:2410.10989 (losses without all logits).
    """
    if is_split(weight):  # by vocabulary, over ranks
        terms: dict[str, Any] = {"softcap": softcap, "z_loss": z_loss, "label_smoothing": label_smoothing}
        return split_linear_cross_entropy(hidden, weight, targets, bias=bias, **terms)
    loss, sums, count = _applied(
        (hidden, weight, bias, targets), budget_bytes, (softcap, z_loss, label_smoothing, False, False)
    )
    return TokenLoss(loss, sums[0], count)


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
    """
    if is_split(weight):
        terms: dict[str, Any] = {"softcap": softcap, "z_loss": z_loss, "label_smoothing": label_smoothing}
        return split_measured_cross_entropy(hidden, weight, targets, bias=bias, by_confidence=by_confidence, **terms)
    options = (softcap, z_loss, label_smoothing, by_confidence, True)
    loss, sums, count = _applied((hidden, weight, bias, targets), None, options)
    return MeasuredLoss(TokenLoss(loss, sums[0], count), sums[1], sums[2])


def _applied(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor], budget: int | None, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias, targets = tensors
    labels = targets.reshape(-1)
    needs = (torch.is_grad_enabled() and part is not None and part.requires_grad for part in (hidden, weight, bias))
    budget = default_budget(hidden.device) if budget is None else budget
    dtypes = (autocast_dtype(hidden), hidden.dtype, weight.dtype)
    chosen = _Options(*(*options, IGNORE_INDEX, budget, *dtypes, *needs))
    loss, sums = _operation(hidden.reshape(-1, hidden.size(-1)), weight, bias, labels, *chosen)
    return loss, sums.detach(), (labels != IGNORE_INDEX).sum()


def _linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = _Options(*rest)
    head = Head(hidden, weight, bias, targets, options.softcap, 1.0, options.ignore_index).cast(options.dtype)
    in_place = use_triton("linear_cross_entropy", hidden.device, supported(head.hidden))
    needs = (options.needs_hidden, options.needs_weight, options.needs_bias)
    gradients = HeadGradients(head, needs, budget=options.budget)
    exact = torch.float32 if hidden.device.type == "mps" else torch.float64
    loss_sum = torch.zeros((), dtype=exact, device=hidden.device)
    sums = torch.zeros(3, dtype=exact, device=hidden.device)
    for rows in row_chunks(head, options.budget, in_place=in_place):
        losses, measures, grad = _chunk(head, rows, options, any(needs))
        loss_sum += losses.sum(dtype=exact)
        sums += measures.sum(dim=1, dtype=exact)
        if grad is not None:
            gradients.add(rows, grad)
        del grad  # before the next piece is made
    loss = loss_sum.to(torch.promote_types(hidden.dtype, torch.float32))
    # A buffer that is returned twice would be one result under two names, which an operator may not have.
    return loss if loss is not loss_sum else loss.clone(), sums, gradients.hidden, gradients.weight, gradients.bias


def _chunk(head: Head, rows: slice, options: _Options, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return losses, what is measured, and the gradient with respect to the logits of some rows."""
    logits = head.logits(rows)
    averaged = options.label_smoothing > 0
    found = statistics(logits, operation="linear_cross_entropy", averaged=averaged, measured=options.measured)
    losses = row_losses(found, options.z_loss, options.label_smoothing)
    measures = torch.stack((found.nll, found.entropy, found.correct))
    certain = found.nll.neg().exp() if options.by_confidence else None
    losses = losses if certain is None else losses * certain
    if not needs_grad:
        return losses, measures, None
    coefficients = loss_coefficients(
        found.normaliser.value,
        torch.ones_like(losses) if certain is None else certain,
        len(head.weight),
        z_loss=options.z_loss,
        label_smoothing=options.label_smoothing,
    )
    grad = gradient(logits, found.normaliser, coefficients, operation="linear_cross_entropy", out=logits.values)
    return losses, measures, grad


def _linear_cross_entropy_backward(
    grad: Tensor | None, grad_sums: Any, of_hidden: Tensor, of_weight: Tensor, of_bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    options = _Options(*rest)
    dtypes = (options.hidden_dtype, options.weight_dtype, options.weight_dtype)
    factor = of_weight.new_zeros(()) if grad is None else grad
    first, second, third = (
        (part * factor.to(torch.promote_types(part.dtype, torch.float32))).to(dtype)
        for part, dtype in zip((of_hidden, of_weight, of_bias), dtypes, strict=True)
    )
    return first, second, third


def _fake_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> Any:
    options = _Options(*rest)
    precise = torch.promote_types(options.dtype, torch.float32)
    exact = torch.float32 if hidden.device.type == "mps" else torch.float64
    has_bias = bias is not None and options.needs_bias
    return (
        hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32)),
        hidden.new_empty(3, dtype=exact),
        hidden.new_empty(hidden.shape if options.needs_hidden else 0, dtype=options.dtype),
        hidden.new_empty(*(weight.shape if options.needs_weight else (0,)),
                         dtype=precise if options.needs_weight else options.dtype),
        hidden.new_empty(len(weight) if has_bias else 0, dtype=precise if has_bias else options.dtype),
    )  # fmt: skip


def _fake_backward(grad: Any, grad_sums: Any, of_hidden: Tensor, of_weight: Tensor, of_bias: Tensor, *rest: Any) -> Any:
    options = _Options(*rest)
    dtypes = (options.hidden_dtype, options.weight_dtype, options.weight_dtype)
    parts = zip((of_hidden, of_weight, of_bias), dtypes, strict=True)
    return tuple(part.new_empty(part.shape, dtype=dtype) for part, dtype in parts)


_ARGUMENTS = (
    "float? softcap, float z_loss, float label_smoothing, bool by_confidence, bool measured, int ignore_index,"
    " int budget, ScalarType dtype, ScalarType hidden_dtype, ScalarType weight_dtype,"
    " bool needs_hidden, bool needs_weight, bool needs_bias"
)

_operation = Operation(
    _linear_cross_entropy_forward,
    _linear_cross_entropy_backward,
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_schema="(Tensor? grad, Tensor? grad_sums, Tensor of_hidden, Tensor of_weight, Tensor of_bias,"
    f" {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda _, results: results[2:],
    arrange=lambda of_hidden, of_weight, of_bias: (of_hidden, of_weight, of_bias, None),
    visible=2,
)


@flop_formula(torch.ops.lightning_lm.linear_cross_entropy)
def _flops(hidden: Any, weight: Any, bias: Any, targets: Any, *rest: Any, **_: Any) -> int:
    """Count one product for the logits and one for each gradient, which are made in the forward pass."""
    options = _Options(*rest)
    return int(2 * hidden[0] * hidden[1] * weight[0] * (1 + options.needs_hidden + options.needs_weight))

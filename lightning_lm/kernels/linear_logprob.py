"""Log-probabilities and entropies of tokens straight from features, with the gradients of both; never all logits."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.functional.logprobs import TokenScores, linear_token_scores
from lightning_lm.functional.vocab_parallel import is_split
from lightning_lm.kernels.backend import use_triton
from lightning_lm.kernels.flops import flop_formula
from lightning_lm.kernels.head import Head, HeadGradients, autocast_dtype, default_budget, row_chunks
from lightning_lm.kernels.operation import Operation
from lightning_lm.kernels.vocabulary import Coefficients, Normaliser, gradient, statistics, supported
from lightning_lm.types import IGNORE_INDEX

__all__ = ["linear_logprob", "linear_nll", "supported"]


class _Options(NamedTuple):
    """What follows the tensors in the operation's arguments."""

    softcap: float | None
    temperature: float
    measured: bool
    budget: int
    dtype: torch.dtype
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool


def linear_logprob(
    hidden: Float[Tensor, "*tokens d_model"],
    weight: Float[Tensor, "vocab d_model"],
    ids: Int[Tensor, "*tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy_gradient: bool = False,
    budget_bytes: int | None = None,
) -> TokenScores:
    """Return log-probabilities and entropies from features, in float32, without ever holding all logits.

    Each piece of the logits is built, read and dropped, and built again in the backward pass, where the upstream
    gradients of both scores become that of the logits in one pass over them.

    Args:
        hidden: Features of each position, aligned with ``ids`` (already shifted).
        weight: The output head.
        ids: The token at each position; ``IGNORE_INDEX`` gives zeros.
        bias: Added to the logits.
        temperature: Divides the logits.
        softcap: If given, logits become ``softcap * tanh(logits / softcap)`` first.
        entropy_gradient: Let gradients flow through the entropies; otherwise they are for the log.
        budget_bytes: Logits held at once, with all that is made of them; at least one row is. By default 512 MiB on a
            GPU and 56 MiB on a CPU.
    """
    if is_split(weight):  # by vocabulary, over ranks
        return linear_token_scores(
            hidden,
            weight,
            ids.clamp(min=0),
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            entropy_gradient=entropy_gradient,
        )
    logprobs, entropies = _scores(
        (hidden, weight, bias, ids), budget_bytes, temperature=temperature, softcap=softcap, measured=True
    )
    return TokenScores(logprobs, entropies if entropy_gradient else entropies.detach())


def linear_nll(
    hidden: Float[Tensor, "*tokens d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, "*tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    budget_bytes: int | None = None,
) -> Float[Tensor, "*tokens"]:
    """Return the negative log-likelihood of each target in nats and float32, without gradients: for evaluation.

    Args:
        hidden: Features of each position.
        weight: The output head.
        targets: Token ids; ``IGNORE_INDEX`` gives zero.
        bias: Added to the logits.
        softcap: If given, logits become ``softcap * tanh(logits / softcap)``.
        budget_bytes: Logits held at once, with all that is made of them; at least one row is. By default 512 MiB on a
            GPU and 56 MiB on a CPU.
    """
    with torch.no_grad():
        logprobs, _ = _scores(
            (hidden, weight, bias, targets), budget_bytes, temperature=1.0, softcap=softcap, measured=False
        )
        return -logprobs


def _scores(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    budget: int | None,
    *,
    temperature: float,
    softcap: float | None,
    measured: bool,
) -> tuple[Tensor, Tensor]:
    hidden, weight, bias, ids = tensors
    needs = (part is not None and part.requires_grad for part in (hidden, weight, bias))
    budget = default_budget(hidden.device) if budget is None else budget
    logprobs, entropies = _operation(
        hidden.reshape(-1, hidden.size(-1)), weight, bias, ids.reshape(-1),
        *_Options(softcap, temperature, measured, budget, autocast_dtype(hidden), *needs),
    )  # fmt: skip
    return logprobs.view(ids.shape), entropies.view(ids.shape)


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, options: _Options) -> Head:
    return Head(hidden, weight, bias, ids, options.softcap, options.temperature, IGNORE_INDEX).cast(options.dtype)


def _linear_logprob_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = _Options(*rest)
    head = _head(hidden, weight, bias, ids, options)
    in_place = use_triton("linear_logprob", hidden.device, supported(head.hidden))
    found = torch.zeros(4, len(hidden), dtype=torch.promote_types(options.dtype, torch.float32), device=hidden.device)
    for rows in row_chunks(head, options.budget, in_place=in_place):
        part = statistics(head.logits(rows), operation="linear_logprob", measured=options.measured)
        found[:, rows] = torch.stack((-part.nll, part.entropy, *part.normaliser))
    logprobs, entropies, peak, log_total = (column.clone() for column in found)
    return logprobs, entropies, peak, log_total


def _linear_logprob_backward(
    grad: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    ids, entropies, peak, log_total, *last = rest
    options = _Options(*last)
    head = _head(hidden, weight, bias, ids, options)
    in_place = use_triton("linear_logprob", hidden.device, supported(head.hidden))
    needs = (options.needs_hidden, options.needs_weight, options.needs_bias)
    gradients = HeadGradients(head, needs, budget=options.budget)
    of_logprob = torch.zeros_like(peak) if grad is None else grad
    softmax = -of_logprob if grad_entropy is None else -of_logprob - grad_entropy * entropies
    for rows in row_chunks(head, options.budget, in_place=in_place):
        coefficients = Coefficients(
            softmax[rows].contiguous(),
            of_logprob[rows].contiguous(),
            entropy=None if grad_entropy is None else -grad_entropy[rows].contiguous(),
        )
        logits, normaliser = head.logits(rows), Normaliser(peak[rows], log_total[rows])
        gradient(logits, normaliser, coefficients, operation="linear_logprob", out=logits.values)
        gradients.add(rows, logits.values)
        del logits  # before the next piece is made
    first, second, third = (
        part.to(like.dtype)
        for part, like in (
            (gradients.hidden, hidden), (gradients.weight, weight), (gradients.bias, weight if bias is None else bias)
        )
    )  # fmt: skip
    return first, second, third


def _fake_forward(hidden: Tensor, weight: Tensor, bias: Any, ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(_Options(*rest).dtype, torch.float32)
    return tuple(hidden.new_empty(hidden.size(0), dtype=dtype) for _ in range(4))


def _fake_backward(
    grad: Any, grad_entropy: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    options = _Options(*rest[4:])
    needs = (options.needs_hidden, options.needs_weight, options.needs_bias and bias is not None)
    parts = zip((hidden, weight, weight if bias is None else bias), needs, strict=True)
    return tuple(part.new_empty(part.shape if need else (0,)) for part, need in parts)


_ARGUMENTS = (
    "float? softcap, float temperature, bool measured, int budget, ScalarType dtype, bool needs_hidden,"
    " bool needs_weight, bool needs_bias"
)
_operation = Operation(
    _linear_logprob_forward,
    _linear_logprob_backward,
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backward_schema="(Tensor? grad, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, Tensor ids,"
    f" Tensor entropies, Tensor peak, Tensor log_total, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda tensors, results: (*tensors, *results[1:]),
    arrange=lambda of_hidden, of_weight, of_bias: (of_hidden, of_weight, of_bias, None),
    visible=2,
)


@flop_formula(torch.ops.lightning_lm.linear_logprob)
def _forward_flops(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * hidden[0] * hidden[1] * weight[0])


@flop_formula(torch.ops.lightning_lm.linear_logprob_backward)
def _backward_flops(grad: Any, grad_entropy: Any, hidden: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Count the logits once more, and a product for each gradient."""
    needs_hidden, needs_weight, _needs_bias = rest[-3:]
    return int(2 * hidden[0] * hidden[1] * weight[0] * (1 + needs_hidden + needs_weight))

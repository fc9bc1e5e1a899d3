"""Log-probabilities and entropies of tokens from hidden states, with the gradients of both; never all logits."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_lm.functional.logprobs import TokenScores
from lightning_lm.kernels.lm_head.head import (
    INPUTS,
    OPTIONS,
    Head,
    HeadGradients,
    empty_gradients,
    matmul_flops,
    open_head,
)
from lightning_lm.kernels.lm_head.logits import Coefficients, Normaliser
from lightning_lm.kernels.runtime.flop_formulas import flop_formula
from lightning_lm.kernels.runtime.operation import Operation

__all__ = ["linear_logprob", "linear_nll", "linear_target_scores"]


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
    """Return log-probabilities and entropies from hidden states, in float32, without ever holding all logits.

    Each chunk of logits is computed, read and dropped, and recomputed in the backward pass, where the upstream
    gradients of both results become that of the logits in one pass. If the rows of the weight are sharded over ranks
    (tensor parallelism), each computes the logits of its own ids, and the results are the same on all.

    Args:
        hidden: Hidden states of each position, aligned with ``ids`` (already shifted).
        weight: The output head.
        ids: The token at each position; ``IGNORE_INDEX`` gives zeros.
        bias: Added to the logits.
        temperature: Divides the logits.
        softcap: If given, logits become ``softcap * tanh(logits / softcap)`` first.
        entropy_gradient: Let gradients flow through the entropies; otherwise they are for the log.
        budget_bytes: Size of a chunk of logits with all temporary matrices; at least one row. By default 512 MiB on a
            GPU and 40 MiB on a CPU, or more if 256 rows of a large vocabulary need more.
    """
    options: dict[str, Any] = {"softcap": softcap, "temperature": temperature, "budget_bytes": budget_bytes}
    scores = _operation(*open_head(hidden, weight, bias, ids, measured=True, **options))
    logprobs, entropies = (score.view(ids.shape) for score in scores)
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
        hidden: Hidden states of each position.
        weight: The output head.
        targets: Token ids; ``IGNORE_INDEX`` gives zero.
        bias: Added to the logits.
        softcap: If given, logits become ``softcap * tanh(logits / softcap)``.
        budget_bytes: Size of a chunk of logits with all temporary matrices; at least one row. By default 512 MiB on a
            GPU and 40 MiB on a CPU, or more if 256 rows of a large vocabulary need more.
    """
    with torch.no_grad():
        head = open_head(hidden, weight, bias, targets, softcap=softcap, budget_bytes=budget_bytes)
        logprobs: Tensor = _operation(*head)[0]
        return -logprobs.view(targets.shape)


def linear_target_scores(
    hidden: Float[Tensor, "rows d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, " rows"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Return the log-probability of each target, and whether it is the likeliest token; without gradients.

    Args:
        hidden: Hidden states of each position.
        weight: The output head.
        targets: Token ids.
        bias: Added to the logits.
        softcap: If given, logits become ``softcap * tanh(logits / softcap)``.
    """
    with torch.no_grad():
        head, name = open_head(hidden, weight, bias, targets, softcap=softcap, measured=True).cast(), "linear_logprob"
        parts = [head.statistics(logits, name) for _, logits in head.chunks(name)]
        if not parts:
            return hidden.new_zeros(0, dtype=torch.float32), targets.bool()
        return torch.cat([-part.nll for part in parts]), torch.cat([part.correct for part in parts]) > 0


def _linear_logprob_forward(*arguments: Any) -> tuple[Tensor, ...]:
    head = Head(*arguments).cast()
    found = head.hidden.new_zeros(4, len(head.hidden), dtype=torch.promote_types(head.dtype, torch.float32))
    for rows, logits in head.chunks("linear_logprob"):
        part = head.statistics(logits, "linear_logprob")
        found[:, rows] = torch.stack((-part.nll, part.entropy, *part.normaliser))
        del logits  # before the next chunk is made
    return tuple(column.clone() for column in found)


def _linear_logprob_backward(
    grad: Tensor | None, grad_entropy: Tensor | None, *saved_and_options: Any
) -> tuple[Tensor, ...]:
    head, entropies, peak, log_total = _saved(*saved_and_options)
    head = head.cast()
    gradients = HeadGradients(head)
    of_logprob = torch.zeros_like(peak) if grad is None else grad
    softmax = -of_logprob if grad_entropy is None else -of_logprob - grad_entropy * entropies
    for rows, logits in head.chunks("linear_logprob"):
        coefficients = Coefficients(
            softmax[rows].contiguous(),
            of_logprob[rows].contiguous(),
            entropy=None if grad_entropy is None else -grad_entropy[rows].contiguous(),
        )
        normaliser = Normaliser(peak[rows], log_total[rows])
        gradients.add(rows, head.gradient(logits, normaliser, coefficients, "linear_logprob"))
        del logits  # before the next chunk is made
    return gradients.hidden, gradients.weight, gradients.bias


def _saved(hidden: Any, weight: Any, bias: Any, ids: Any, *rest: Any) -> tuple[Head, Any, Any, Any]:
    """Return the saved head, entropies, and the two parts of the log-normaliser."""
    entropies, peak, log_total, *options = rest
    return Head(hidden, weight, bias, ids, *options), entropies, peak, log_total


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    head = Head(*arguments)
    dtype = torch.promote_types(head.dtype, torch.float32)
    return tuple(head.hidden.new_empty(len(head.hidden), dtype=dtype) for _ in range(4))


def _fake_backward(grad: Any, grad_entropy: Any, *saved_and_options: Any) -> tuple[Tensor, ...]:
    return empty_gradients(_saved(*saved_and_options)[0])


_operation = Operation(
    _linear_logprob_forward,
    _linear_logprob_backward,
    schema=f"({INPUTS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    backward_schema=f"(Tensor? grad, Tensor? grad_entropy, {INPUTS}, Tensor entropies, Tensor peak, Tensor log_total,"
    f" {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda tensors, results: (*tensors, *results[1:]),
    visible=2,
)


@flop_formula(torch.ops.lightning_lm.linear_logprob)
def _forward_flops(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * hidden[0] * hidden[1] * weight[0])


@flop_formula(torch.ops.lightning_lm.linear_logprob_backward)
def _backward_flops(grad: Any, grad_entropy: Any, *saved_and_options: Any, **_: Any) -> int:
    """Count the logits once more, and a matmul for each gradient."""
    return matmul_flops(_saved(*saved_and_options)[0])

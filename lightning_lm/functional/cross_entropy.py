"""Token cross-entropy as sums with counts, from logits or straight from features without ever holding all logits."""

import contextlib
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lm.functional.vocab_parallel import Survey, Vocabulary, split_head
from lightning_lm.types import IGNORE_INDEX

__all__ = ["MeasuredLoss", "TokenLoss", "linear_cross_entropy", "measured_cross_entropy", "token_cross_entropy"]

_CHUNK_ELEMENTS = {"cpu": 2**21, "default": 2**26}
"""Logits held at once: on a CPU as many as stay in its caches, elsewhere 256 MiB of float32."""


class TokenLoss(NamedTuple):
    """Sums over the target tokens of a batch; divide once, after all batches and ranks are added up."""

    loss_sum: Float[Tensor, ""]
    """What training minimises, differentiable: cross-entropy with label smoothing and z-loss. Nats."""
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


class _Terms(NamedTuple):
    """The options of the loss, as the chunks need them."""

    vocabulary: Vocabulary
    softcap: float | None
    z_loss: float
    label_smoothing: float
    by_confidence: bool = False
    measured: bool = False


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
        targets: Token ids, or `ignore_index` where nothing is learned.
        z_loss: Weight of the squared log-normaliser. Unitless.
        label_smoothing: Share of the target spread evenly over the vocabulary. Unitless.
        by_confidence: Multiply each token's loss by its probability, which is taken as a constant.
        ignore_index: Label of positions that count for nothing.
    """
    flat = _accurate(logits.reshape(-1, logits.shape[-1]))
    labels, valid = _safe_targets(targets.reshape(-1), ignore_index)
    log_normaliser = flat.logsumexp(dim=-1)
    target_logits = flat.gather(1, labels[:, None]).squeeze(1)
    nll = log_normaliser - target_logits
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (log_normaliser - flat.mean(dim=-1))
    if z_loss:
        loss = loss + z_loss * log_normaliser.square()
    if by_confidence:
        loss = loss * nll.detach().neg().exp()
    # `where` and not a product: an ignored row may hold anything, inf and NaN included.
    loss_sum = torch.where(valid, loss, 0).sum()
    nll_sum = torch.where(valid, nll, 0).sum(dtype=_sum_dtype(logits.device))
    return TokenLoss(loss_sum, nll_sum.detach(), valid.sum())


def linear_cross_entropy(
    hidden: Float[Tensor, "*rows d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, "*rows"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
) -> TokenLoss:
    """Sum the cross-entropy of ``hidden @ weight.T`` over the target tokens without holding all logits.

    Logits and their gradients exist for one chunk of rows at a time, so memory does not grow with rows x vocabulary;
    the gradients are computed along with the loss, which also saves reading the logits twice. Can be differentiated
    once. Under autocast the products run in its type; everything else is float32 or better. Where ranks share the rows
    of the weight (tensor parallelism) each computes the logits of its own ids, and the result is the same on all.

    Args:
        hidden: Features of each position.
        weight: One row per token id.
        targets: Token ids, or `ignore_index` where nothing is learned.
        bias: Added to the logits.
        softcap: Replace the logits by ``softcap * tanh(logits / softcap)``.
        z_loss: Weight of the squared log-normaliser. Unitless.
        label_smoothing: Share of the target spread evenly over the vocabulary. Unitless.
        ignore_index: Label of positions that count for nothing.

    Source:
        Chowdhery et al. 2022, arXiv:2204.02311, section 5 (z-loss); Szegedy et al. 2015, arXiv:1512.00567, section 7
        (label smoothing); Gemma Team 2024, arXiv:2408.00118, section 2 (soft-cap).
    """
    labels, valid = _safe_targets(targets.reshape(-1), ignore_index)
    head = split_head(hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    terms = _Terms(head.vocabulary, softcap, z_loss, label_smoothing)
    loss_sum, sums = _ChunkedLoss.apply(*head[:3], labels, valid, terms)  # type: ignore[no-untyped-call]
    return TokenLoss(loss_sum, sums[0], valid.sum())


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
    labels, valid = _safe_targets(targets, IGNORE_INDEX)
    head = split_head(hidden, weight, bias)
    terms = _Terms(head.vocabulary, softcap, z_loss, label_smoothing, by_confidence, measured=True)
    loss_sum, sums = _ChunkedLoss.apply(*head[:3], labels, valid, terms)  # type: ignore[no-untyped-call]
    nll_sum, entropy_sum, num_correct = sums.unbind()
    return MeasuredLoss(TokenLoss(loss_sum, nll_sum, valid.sum()), entropy_sum, num_correct)


def _safe_targets(
    targets: Int[Tensor, " rows"], ignore_index: int
) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
    valid = targets != ignore_index
    return torch.where(valid, targets, 0), valid


def _accurate(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _sum_dtype(device: torch.device) -> torch.dtype:
    """Return float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients of the output layer, chunk by chunk, in one pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, valid: Tensor, terms: _Terms
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        chunks = _Chunks(hidden, weight, bias, terms, dtype=dtype, needs_grad=ctx.needs_input_grad[:3])
        size = max(1, _CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS["default"]) // terms.vocabulary.stretch)
        with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
            for start in range(0, len(hidden), size):
                rows = slice(start, min(start + size, len(hidden)))
                chunks.add(rows, labels[rows], valid[rows])
        ctx.gradients = chunks.gradients(hidden, weight, bias)
        loss_sum = chunks.loss_sum.to(torch.promote_types(hidden.dtype, torch.float32))
        ctx.mark_non_differentiable(chunks.sums)
        return loss_sum, chunks.sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy can be differentiated once; compute the loss again.")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if grad is None else grad.mul_(upstream[0].to(grad.dtype)) for grad in gradients]
        return (*scaled, None, None, None)


class _Chunks:
    """Running sums and gradients over chunks of rows."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        terms: _Terms,
        *,
        dtype: torch.dtype,
        needs_grad: tuple[bool, bool, bool],
    ) -> None:
        accurate = torch.promote_types(dtype, torch.float32)
        self.hidden, self.weight, self.terms = hidden.to(dtype), weight.to(dtype), terms
        self.bias = None if bias is None else bias.to(accurate)
        self.accurate = accurate
        needs_hidden, needs_weight, needs_bias = needs_grad
        self.needs_grad = any(needs_grad)
        self.grad_hidden = torch.empty_like(self.hidden) if needs_hidden else None
        self.grad_weight = torch.zeros_like(weight, dtype=accurate) if needs_weight else None
        self.grad_bias = torch.zeros_like(bias, dtype=accurate) if needs_bias and bias is not None else None
        sums = _sum_dtype(hidden.device)
        self.loss_sum = torch.zeros((), dtype=sums, device=hidden.device)
        self.sums = torch.zeros(3, dtype=sums, device=hidden.device)
        """Of log-likelihoods, entropies and correct predictions."""

    def add(self, rows: slice, labels: Tensor, valid: Tensor) -> None:
        """Add the loss and the gradients of some rows."""
        logits = (self.hidden[rows] @ self.weight.T).to(self.accurate)
        if self.bias is not None:
            logits += self.bias
        cap = self.terms.softcap
        if cap is not None:
            logits.div_(cap).tanh_().mul_(cap)
        vocabulary = self.terms.vocabulary
        survey = vocabulary.survey(logits, labels, mean=self.terms.label_smoothing != 0)
        normaliser, nll = survey.normaliser, survey.normaliser - survey.target
        self.sums[0] += torch.where(valid, nll, 0).sum()
        self.loss_sum += torch.where(valid, self._objective(nll, survey), 0).sum()
        if self.terms.measured:
            mean_logits = vocabulary.total((logits - normaliser[:, None]).exp_().mul_(logits).sum(dim=-1))
            self.sums[1] += torch.where(valid, normaliser - mean_logits, 0).sum()
            self.sums[2] += (valid & vocabulary.are_largest(survey, logits, labels)).sum()
        if self.needs_grad:
            slope = None if cap is None else 1 - (logits / cap).square()
            grad = self._grad_logits(logits, labels, valid, normaliser)
            if self.terms.by_confidence:
                grad.mul_(torch.where(valid, nll, 0).neg().exp()[:, None])
            self._propagate(rows, grad if slope is None else grad.mul_(slope))

    def _objective(self, nll: Tensor, survey: Survey) -> Tensor:
        smoothing, z_loss = self.terms.label_smoothing, self.terms.z_loss
        loss = nll
        if survey.mean is not None:
            loss = (1 - smoothing) * nll + smoothing * (survey.normaliser - survey.mean)
        loss = loss + z_loss * survey.normaliser.square() if z_loss else loss
        return loss * nll.neg().exp() if self.terms.by_confidence else loss

    def _grad_logits(self, logits: Tensor, labels: Tensor, valid: Tensor, normaliser: Tensor) -> Tensor:
        """Overwrite the logits by the gradient of the loss with respect to them."""
        smoothing, z_loss = self.terms.label_smoothing, self.terms.z_loss
        # An infinite normaliser makes the probabilities of an ignored row zero at no cost.
        grad = logits.sub_(torch.where(valid, normaliser, torch.inf)[:, None]).exp_()
        if z_loss:
            grad.mul_((1 + 2 * z_loss * normaliser)[:, None])
        weights = valid.to(grad.dtype)
        if smoothing:
            grad.sub_((weights * (smoothing / self.terms.vocabulary.size))[:, None])
        return self.terms.vocabulary.add_at(grad, labels, weights * (smoothing - 1))

    def _propagate(self, rows: slice, grad: Tensor) -> None:
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(dim=0)
        grad = grad.to(self.hidden.dtype)
        if self.grad_hidden is not None:
            torch.mm(grad, self.weight, out=self.grad_hidden[rows])
        if self.grad_weight is None:
            return
        if grad.dtype == self.grad_weight.dtype:
            self.grad_weight.addmm_(grad.T, self.hidden[rows])
        else:
            self.grad_weight += grad.T @ self.hidden[rows]

    def gradients(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients in the types of their inputs, ``None`` where none is needed."""
        pairs = ((self.grad_hidden, hidden), (self.grad_weight, weight), (self.grad_bias, bias))
        return tuple(None if grad is None or of is None else grad.to(of.dtype) for grad, of in pairs)

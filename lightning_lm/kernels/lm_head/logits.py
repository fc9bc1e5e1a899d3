"""The two passes over rows of logits that every loss and score of tokens is made of: statistics, then a gradient.

With ``z`` the logits after bias, soft-cap and temperature and ``p`` their softmax, the gradient of anything made of
log-normaliser, target, mean and entropy has the form ``p (a + e log p) + t [target] + c``, with four numbers for each
row. So one kernel serves cross-entropy with all its terms, log-probabilities and entropies, and the upstream gradient
costs nothing: it is in the four numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.functional.dtypes import at_least_float32
from lightning_lm.kernels.runtime.backend import unsupported_dtype, use_triton
from lightning_lm.kernels.runtime.launch import jit, launch
from lightning_lm.kernels.runtime.launch_settings import settings

if TYPE_CHECKING:
    import triton.language as tl

__all__ = [
    "WORK_BYTES",
    "Coefficients",
    "Logits",
    "Normaliser",
    "RowStatistics",
    "gradient",
    "loss_coefficients",
    "row_losses",
    "statistics",
]

WORK_BYTES = 16 * 2**20
"""Bytes of the temporary matrices that torch makes of logits at once, so that they stay in caches."""


class Logits(NamedTuple):
    """Raw scores, and what they go through before the softmax."""

    values: Float[Tensor, "rows vocab"]
    targets: Int[Tensor, " rows"]
    """Token ids; rows with `ignore_index` give zeros and are never read."""
    bias: Float[Tensor, " vocab"] | None = None
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100


class Normaliser(NamedTuple):
    """The logarithm of a row's sum of exponentials, in two parts: added up they lose what is small beside the peak."""

    peak: Float[Tensor, " rows"]
    """The largest logit."""
    log_total: Float[Tensor, " rows"]
    """Logarithm of the sum of ``exp(z - peak)``."""

    @property
    def value(self) -> Float[Tensor, " rows"]:
        """The log-normaliser."""
        return self.peak + self.log_total


class RowStatistics(NamedTuple):
    """Statistics of a row's logits; float32 or better, zeros for ignored rows."""

    normaliser: Normaliser
    target: Float[Tensor, " rows"]
    """The target's logit."""
    mean: Float[Tensor, " rows"]
    """Mean of all logits."""
    entropy: Float[Tensor, " rows"]
    correct: Float[Tensor, " rows"]
    """One where the target is the likeliest."""

    @property
    def nll(self) -> Float[Tensor, " rows"]:
        """Negative log-likelihood of the target, in nats."""
        return self.normaliser.log_total - (self.target - self.normaliser.peak)


class Coefficients(NamedTuple):
    """The four numbers of each row's gradient; ``None`` for zeros."""

    softmax: Float[Tensor, " rows"]
    target: Float[Tensor, " rows"]
    constant: Float[Tensor, " rows"] | None = None
    entropy: Float[Tensor, " rows"] | None = None


def row_losses(found: RowStatistics, z_loss: float, label_smoothing: float) -> Tensor:
    """Return what training minimises for each row, in nats.

    Args:
        found: Statistics of the rows.
        z_loss: Weight of the squared log-normaliser.
        label_smoothing: Fraction of the target spread evenly over the vocabulary.
    """
    losses, log_normaliser = found.nll, found.normaliser.value
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (log_normaliser - found.mean)
    return losses + z_loss * log_normaliser.square() if z_loss else losses


def loss_coefficients(
    normaliser: Tensor, upstream: Tensor, vocab_size: int, *, z_loss: float, label_smoothing: float
) -> Coefficients:
    """Return the numbers that make the gradient of `row_losses`.

    Args:
        normaliser: The log-normaliser of each row.
        upstream: Gradient of each row's loss.
        vocab_size: Number of token ids.
        z_loss: Weight of the squared log-normaliser.
        label_smoothing: Fraction of the target spread evenly over the vocabulary.
    """
    softmax = upstream * (1 + 2 * z_loss * normaliser) if z_loss else upstream
    constant = upstream * (-label_smoothing / vocab_size) if label_smoothing else None
    return Coefficients(softmax, upstream * (label_smoothing - 1), constant)


def statistics(logits: Logits, operation: str, *, averaged: bool = False, measured: bool = False) -> RowStatistics:
    """Read the logits once and return what their losses need.

    Args:
        logits: The scores.
        operation: Name of the operation, for the report.
        averaged: Compute mean logits; zeros otherwise.
        measured: Compute entropies and correct predictions; zeros otherwise.
    """
    if use_triton(operation, logits.values.device, unsupported_dtype(logits.values)):
        return _triton_statistics(logits, averaged, measured)
    found = torch.cat([_reference_statistics(part, averaged, measured) for part in _parts(logits)], dim=1)
    return RowStatistics(Normaliser(*found[:2]), *found[2:])


def gradient(
    logits: Logits, normaliser: Normaliser, coefficients: Coefficients, operation: str, *, out: Tensor
) -> Tensor:
    """Write the gradient with respect to the raw scores, which may be overwritten, and return it.

    Args:
        logits: The scores.
        normaliser: Log-normaliser of `statistics`.
        coefficients: The four numbers of each row.
        operation: Name of the operation, for the report.
        out: Output, of the shape and type of the scores; may be those themselves.
    """
    if use_triton(operation, logits.values.device, unsupported_dtype(logits.values)):
        return _triton_gradient(logits, normaliser, coefficients, out)
    done = 0
    for part in _parts(logits):
        rows = slice(done, done := done + len(part.targets))
        of_rows = Coefficients(*(None if column is None else column[rows] for column in coefficients))  # type: ignore[arg-type]
        into = part.values if out is logits.values else out[rows]
        _reference_gradient(part, Normaliser(normaliser.peak[rows], normaliser.log_total[rows]), of_rows, into)
    return out


def _parts(logits: Logits) -> list[Logits]:
    """Return as many rows at once as `WORK_BYTES` are enough for: torch makes six matrices in float32 of them."""
    size = max(WORK_BYTES // (24 * max(logits.values.shape[1], 1)), 1)
    rows = zip(logits.values.split(size), logits.targets.split(size), strict=True)
    return [logits._replace(values=values, targets=targets) for values, targets in rows]


def _triton_statistics(logits: Logits, averaged: bool, measured: bool) -> RowStatistics:
    values = logits.values
    found = torch.empty(6, len(values), dtype=torch.float32, device=values.device)
    launch(
        _statistics_kernel, (len(values),),
        values, logits.targets, values if logits.bias is None else logits.bias.contiguous(), found,
        values.stride(0), len(values), logits.softcap or 1.0, 1 / logits.temperature, logits.ignore_index,
        VOCAB=values.size(1), BIAS=logits.bias is not None, CAP=logits.softcap is not None, AVERAGED=averaged,
        MEASURED=measured,
        **_settings(values),
    )  # fmt: skip
    return RowStatistics(Normaliser(found[0], found[1]), *found[2:].unbind())


def _triton_gradient(logits: Logits, normaliser: Normaliser, coefficients: Coefficients, out: Tensor) -> Tensor:
    values = logits.values
    softmax, target, constant, entropy = coefficients
    launch(
        _gradient_kernel, (len(values),),
        values, logits.targets, values if logits.bias is None else logits.bias.contiguous(), *normaliser, softmax,
        target, target if constant is None else constant, target if entropy is None else entropy, out,
        values.stride(0), out.stride(0), logits.softcap or 1.0, 1 / logits.temperature, logits.ignore_index,
        VOCAB=values.size(1), BIAS=logits.bias is not None, CAP=logits.softcap is not None,
        CONSTANT=constant is not None, ENTROPY=entropy is not None, **_settings(values),
    )  # fmt: skip
    return out


def _settings(values: Tensor) -> dict[str, int]:
    default = {"BLOCK": 4096, "num_warps": 8}
    return settings("vocabulary", (values.size(1),), values.dtype, device=values.device, default=default)


@jit
def _tanh(x):
    """Exact near zero, where the usual form cancels."""
    square = x * x
    near = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    power = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - power) / (1.0 + power)
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@jit
def _scores(ptr, bias_ptr, columns, mask, softcap, inverse_temperature, BIAS: tl.constexpr, CAP: tl.constexpr):
    """Return the logits after bias, soft-cap and temperature, and the slope of the last two."""
    x = tl.load(ptr + columns, mask=mask, other=-float("inf")).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    slope = tl.full((1,), inverse_temperature, tl.float32)
    if CAP:
        bounded = _tanh(x / softcap)
        slope = (1.0 - bounded * bounded) * inverse_temperature
        x = tl.where(mask, bounded * softcap, -float("inf"))
    return x * inverse_temperature, slope


@jit
def _statistics_kernel(
    values_ptr, targets_ptr, bias_ptr, out_ptr, stride, num_rows, softcap, inverse_temperature, ignore_index,
    VOCAB: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, AVERAGED: tl.constexpr, MEASURED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        for index in tl.static_range(6):
            tl.store(out_ptr + index * num_rows + row, 0.0)
        return
    values_ptr += row * stride
    largest = tl.full((), -3.0e38, tl.float32)  # not -inf, whose difference with itself is not a number
    total = tl.full((), 0.0, tl.float32)
    plain = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)  # sum of exp(x - largest) (x - largest)
    likeliest = tl.full((), 0, tl.int32)
    target_score = tl.full((), -float("inf"), tl.float32)  # of a target outside the vocabulary, which a loss must show
    for start in range(0, VOCAB, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < VOCAB
        x, _ = _scores(values_ptr, bias_ptr, columns, mask, softcap, inverse_temperature, BIAS, CAP)
        top = tl.maximum(largest, tl.max(x, axis=0))
        terms = tl.exp(x - top)
        shrink = tl.exp(largest - top)
        if MEASURED:
            shifted = tl.where(total > 0, shrink * (weighted + total * (largest - top)), 0.0)
            weighted = shifted + tl.sum(tl.where(terms > 0, terms * (x - top), 0.0), axis=0)
            first = tl.min(tl.where(x == top, columns, VOCAB), axis=0)
            likeliest = tl.where(top > largest, first, likeliest)
        total = total * shrink + tl.sum(terms, axis=0)
        if AVERAGED:
            plain += tl.sum(tl.where(mask, x, 0.0), axis=0)
        here = tl.max(tl.where(columns == target, x, -float("inf")), axis=0)
        target_score = tl.maximum(target_score, here)
        largest = top
    tl.store(out_ptr + row, largest)
    tl.store(out_ptr + num_rows + row, tl.log(total))
    tl.store(out_ptr + 2 * num_rows + row, target_score)
    tl.store(out_ptr + 3 * num_rows + row, plain / VOCAB)
    if MEASURED:
        tl.store(out_ptr + 4 * num_rows + row, tl.log(total) - weighted / total)
        tl.store(out_ptr + 5 * num_rows + row, (likeliest == target).to(tl.float32))
    else:
        tl.store(out_ptr + 4 * num_rows + row, 0.0)
        tl.store(out_ptr + 5 * num_rows + row, 0.0)


@jit
def _gradient_kernel(
    values_ptr, targets_ptr, bias_ptr, peak_ptr, log_total_ptr, softmax_ptr, target_ptr, constant_ptr, entropy_ptr,
    out_ptr, stride, out_stride, softcap, inverse_temperature, ignore_index,
    VOCAB: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, CONSTANT: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    values_ptr += row * stride
    out_ptr += row * out_stride
    if target == ignore_index:
        for start in range(0, VOCAB, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            nothing = tl.zeros((BLOCK,), dtype=out_ptr.dtype.element_ty)
            tl.store(out_ptr + columns, nothing, mask=columns < VOCAB)
        return
    peak, log_total = tl.load(peak_ptr + row), tl.load(log_total_ptr + row)
    of_softmax = tl.load(softmax_ptr + row)
    of_target = tl.load(target_ptr + row)
    for start in range(0, VOCAB, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < VOCAB
        x, slope = _scores(values_ptr, bias_ptr, columns, mask, softcap, inverse_temperature, BIAS, CAP)
        log_p = x - peak - log_total
        p = tl.exp(log_p)
        grad = p * of_softmax
        if ENTROPY:
            grad += tl.where(p == 0.0, 0.0, p * log_p) * tl.load(entropy_ptr + row)
        if CONSTANT:
            grad += tl.load(constant_ptr + row)
        grad = tl.where(columns == target, grad + of_target, grad) * slope
        tl.store(out_ptr + columns, grad.to(out_ptr.dtype.element_ty), mask=mask)


def _adjusted(logits: Logits, *, fresh: bool) -> Tensor:
    """Return the logits after bias, soft-cap and temperature, as a tensor of their own if it will be written to."""
    wide = at_least_float32(logits.values)
    wide = wide.clone() if fresh and wide is logits.values else wide
    if logits.bias is not None:
        wide = wide + at_least_float32(logits.bias)
    if logits.softcap is not None:
        wide = (wide / logits.softcap).tanh_().mul_(logits.softcap)
    return wide if logits.temperature == 1 else wide / logits.temperature


def _reference_statistics(logits: Logits, averaged: bool, measured: bool) -> Tensor:
    valid = logits.targets != logits.ignore_index
    columns = torch.where(valid, logits.targets, 0)[:, None]
    x = _adjusted(logits, fresh=False)
    peak, target = x.amax(dim=-1), x.gather(1, columns).squeeze(1)
    mean = x.mean(dim=-1) if averaged else torch.zeros_like(peak)
    correct = (x.argmax(dim=-1, keepdim=True) == columns).squeeze(1).to(x.dtype) if measured else torch.zeros_like(peak)
    x = x - peak[:, None]
    terms = x.exp() if measured else x.exp_()
    total, entropy = terms.sum(dim=-1), torch.zeros_like(peak)
    if measured:  # a probability of zero weighs nothing, however forbidden
        entropy = total.log() - terms.mul_(x.clamp_(min=torch.finfo(x.dtype).min)).sum(dim=-1) / total
    return torch.stack((peak, total.log(), target, mean, entropy, correct)).where(valid, 0)


def _reference_gradient(logits: Logits, normaliser: Normaliser, coefficients: Coefficients, out: Tensor) -> Tensor:
    valid = logits.targets != logits.ignore_index
    labels = torch.where(valid, logits.targets, 0)
    x = _adjusted(logits, fresh=out is not logits.values)
    slope = None if logits.softcap is None else 1 - (x * (logits.temperature / logits.softcap)).square_()
    x.sub_(normaliser.peak[:, None])
    entropy, constant = coefficients.entropy, coefficients.constant
    if entropy is None:
        grad = x.exp_().mul_((coefficients.softmax * normaliser.log_total.neg().exp())[:, None])
    else:
        log_p = x.sub_(normaliser.log_total[:, None])
        inner = log_p.clamp(min=torch.finfo(log_p.dtype).min).mul_(entropy[:, None])
        grad = log_p.exp_().mul_(inner.add_(coefficients.softmax[:, None]))
    if constant is not None:
        grad.add_(constant[:, None])
    grad.scatter_add_(1, labels[:, None], coefficients.target[:, None])
    if slope is not None:
        grad.mul_(slope)
    if logits.temperature != 1:
        grad.div_(logits.temperature)
    # An ignored row may hold anything, inf and NaN included; filling a few rows costs less than a mask over all.
    grad.index_fill_(0, (~valid).nonzero().squeeze(1), 0.0)
    return grad if grad is out else out.copy_(grad)

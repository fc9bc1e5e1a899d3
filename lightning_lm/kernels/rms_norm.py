"""Root-mean-square normalisation, alone or with the addition to the residual stream before it, in one pass each way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lm.functional.dtypes import at_least_float32
from lightning_lm.kernels.rms_norm_wide import wide_backward, wide_forward
from lightning_lm.kernels.runtime.backend import use_triton
from lightning_lm.kernels.runtime.launch import jit, launch, next_power_of_two
from lightning_lm.kernels.runtime.operation import Operation
from lightning_lm.kernels.runtime.rows import (
    LONGEST_ROW,
    partial_sums,
    row_settings,
    rows_of,
    unsupported_rows,
)

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["rms_norm", "supported"]

_LONGEST_ROW = 65536
"""Beyond `rows.LONGEST_ROW` kernels loop over a row; no model needs more than this."""


@overload
def rms_norm(
    x: Float[Tensor, "*batch size"],
    weight: Float[Tensor, " size"] | None,
    *,
    residual: None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    round_first: bool = False,
) -> Float[Tensor, "*batch size"]: ...


@overload
def rms_norm(
    x: Float[Tensor, "*batch size"],
    weight: Float[Tensor, " size"] | None,
    *,
    residual: Float[Tensor, "*batch size"],
    eps: float = 1e-6,
    offset: float = 0.0,
    round_first: bool = False,
) -> tuple[Float[Tensor, "*batch size"], Float[Tensor, "*batch size"]]: ...


def rms_norm(
    x: Float[Tensor, "*batch size"],
    weight: Float[Tensor, " size"] | None,
    *,
    residual: Float[Tensor, "*batch size"] | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    round_first: bool = False,
) -> Any:
    """Divide by the root mean square of the last axis, then multiply by a gain; in float32, whatever the types.

    Args:
        x: Features.
        weight: Gain of each feature, less `offset`; of any float type. ``None`` for no gain.
        residual: Added to ``x`` first; the sum is returned too, rounded to its type before it is normalised.
        eps: Added to the mean square.
        offset: The gain is ``offset + weight``: 1 for Gemma, 0 for Llama.
        round_first: Round to the type of ``x`` before the gain, as the Llama of ``transformers`` does.

    Returns:
        The normalised features, or with a residual those and the sum.

    Source:
        Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    if residual is None:
        return _operation(x, weight, None, eps, offset, round_first)[0]
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return _operation(x.to(dtype), weight, residual.to(dtype), eps, offset, round_first)


def supported(x: Tensor) -> str | None:
    """Return why the kernel cannot take an input, or nothing if it can.

    Args:
        x: Features.
    """
    return unsupported_rows(x, _LONGEST_ROW)


@jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, scale_ptr, x_stride, residual_stride, num_rows, eps, offset,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < SIZE)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0)
    if RESIDUAL:
        other = tl.load(residual_ptr + rows * residual_stride + columns, mask=mask, other=0.0)
        x = (x.to(tl.float32) + other.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows * SIZE + columns, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / SIZE + eps)
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)
    y = wide * scale
    if ROUND:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    if WEIGHT:
        weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
        y = y * (weight + offset)
    tl.store(y_ptr + rows * SIZE + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, weight_ptr, scale_ptr, grad_x_ptr, partial_ptr, grad_stride, grad_sum_stride,
    x_stride, num_rows, rows_per_program, offset,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]
    if WEIGHT:
        weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32) + offset
        grad_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in range(0, rows_per_program, ROWS):
        rows = (program * rows_per_program + step + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < num_rows) & (columns < SIZE)
        grad = tl.load(grad_ptr + rows * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + rows, mask=rows < num_rows, other=0.0)
        unit = x * scale
        if WEIGHT:
            if ROUND:
                grad_weight += grad * unit.to(grad_x_ptr.dtype.element_ty).to(tl.float32)
            else:
                grad_weight += grad * unit
            grad = grad * weight
        along = tl.sum(grad * unit, axis=1, keep_dims=True) / SIZE
        grad_x = (grad - unit * along) * scale
        if RESIDUAL:
            grad_x += tl.load(grad_sum_ptr + rows * grad_sum_stride + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + rows * SIZE + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if WEIGHT:
        total = tl.sum(grad_weight, axis=0, keep_dims=True)
        tl.store(partial_ptr + program * SIZE + columns, total, mask=columns < SIZE)


def _rms_norm_forward(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not use_triton("rms_norm", x.device, supported(x)):
        return _reference_forward(x, weight, residual, eps, offset, round_first)
    y, total, scale = _fake_forward(x, weight, residual, eps, offset, round_first)
    rows, size = rows_of(x), x.size(-1)
    weight = None if weight is None else weight.contiguous()
    if size > LONGEST_ROW:
        second, results = None if residual is None else rows_of(residual), (y, total, scale)
        wide_forward(rows, second, weight, results, eps=eps, offset=offset, round_first=round_first)
        return results
    other = rows if residual is None else rows_of(residual)
    settings = row_settings("rms_norm", size, x)
    launch(
        _forward_kernel, (-(-len(rows) // settings["ROWS"]),),
        rows, other, rows if weight is None else weight, total, y, scale,
        rows.stride(0), other.stride(0), len(rows), eps, offset, SIZE=size, BLOCK=next_power_of_two(size),
        WEIGHT=weight is not None, RESIDUAL=residual is not None, ROUND=round_first, **settings,
    )  # fmt: skip
    return y, total, scale


def _rms_norm_backward(
    grad: Tensor | None, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor,
    eps: float, offset: float, round_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad = torch.zeros_like(x) if grad is None else grad
    grad_sum = grad_sum if grad_sum is not None and grad_sum.numel() else None  # without a residual the sum is empty
    if not use_triton("rms_norm", x.device, supported(x)):
        return _reference_backward(grad, grad_sum, x, weight, scale, offset, round_first)
    rows, upstream, size = rows_of(x), rows_of(grad), x.size(-1)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gain = None if weight is None else weight.contiguous()
    if size > LONGEST_ROW:
        direct = None if grad_sum is None else rows_of(grad_sum)
        found = wide_backward(upstream, direct, rows, gain, scale, grad_x, offset=offset, round_first=round_first)
        return grad_x, x.new_empty(0) if weight is None or found is None else found.to(weight.dtype, copy=True)
    direct = upstream if grad_sum is None else rows_of(grad_sum)
    settings = row_settings("rms_norm_backward", size, x)
    programs, per_program, partial = partial_sums(rows, settings)
    launch(
        _backward_kernel, (programs,),
        upstream, direct, rows, rows if gain is None else gain, scale, grad_x, partial,
        upstream.stride(0), direct.stride(0), rows.stride(0), len(rows), per_program, offset,
        SIZE=size, BLOCK=next_power_of_two(size),
        WEIGHT=weight is not None, RESIDUAL=grad_sum is not None, ROUND=round_first, **settings,
    )  # fmt: skip
    return grad_x, x.new_empty(0) if weight is None else partial.sum(0).to(weight.dtype)


def _reference_forward(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = x if residual is None else (at_least_float32(x) + at_least_float32(residual)).to(x.dtype)
    wide = at_least_float32(total)
    scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    y = wide * scale
    y = y.to(x.dtype).to(y.dtype) if round_first else y
    y = y if weight is None else y * (at_least_float32(weight) + offset)
    kept = x.new_empty(0) if residual is None else total.contiguous()
    return y.to(x.dtype).contiguous(), kept, scale.squeeze(-1)


def _reference_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    offset: float,
    round_first: bool,
) -> tuple[Tensor, Tensor]:
    wide, scale = at_least_float32(grad), scale.unsqueeze(-1)
    unit = at_least_float32(x) * scale
    grad_weight = x.new_empty(0)
    if weight is not None:
        gain = unit.to(x.dtype).to(unit.dtype) if round_first else unit
        grad_weight = (wide * gain).flatten(0, -2).sum(0).to(weight.dtype)
        wide = wide * (at_least_float32(weight) + offset)
    grad_x = (wide - unit * (wide * unit).mean(dim=-1, keepdim=True)) * scale
    grad_x = grad_x if grad_sum is None else grad_x + at_least_float32(grad_sum)
    return grad_x.to(x.dtype).contiguous(), grad_weight


def _fake_forward(x: Tensor, weight: Tensor | None, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, at_least_float32(x.new_empty(0)).new_empty(x.shape[:-1])


def _fake_backward(
    grad: Tensor | None, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _saved(tensors: tuple[Tensor | None, ...], results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    x, weight, residual = tensors
    return x if residual is None else results[1], weight, results[2]


_operation = Operation(
    _rms_norm_forward,
    _rms_norm_backward,
    schema="(Tensor x, Tensor? weight, Tensor? residual, float eps, float offset, bool round_first)"
    " -> (Tensor, Tensor, Tensor)",
    backward_schema="(Tensor? grad, Tensor? grad_sum, Tensor x, Tensor? weight, Tensor scale, float eps, float offset,"
    " bool round_first) -> (Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=_saved,
    arrange=lambda grad_x, grad_weight: (grad_x, grad_weight, grad_x),
    visible=2,
)

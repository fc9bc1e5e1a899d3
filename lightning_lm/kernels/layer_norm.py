"""Layer normalisation in one pass each way, with the gradients of gain and bias added up in a fixed order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lm.functional.dtypes import at_least_float32
from lightning_lm.kernels.runtime.backend import use_triton
from lightning_lm.kernels.runtime.launch import jit, launch, next_power_of_two
from lightning_lm.kernels.runtime.operation import Operation
from lightning_lm.kernels.runtime.rows import partial_sums, row_settings, rows_of, unsupported_rows

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["layer_norm", "supported"]


def layer_norm(
    x: Float[Tensor, "*batch size"],
    weight: Float[Tensor, " size"] | None,
    bias: Float[Tensor, " size"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch size"]:
    """Subtract the mean of the last axis, divide by the standard deviation, then multiply by a gain and add a bias.

    Computed in float32, whatever the types, and rounded once.

    Args:
        x: Features.
        weight: Gain of each feature; ``None`` for one.
        bias: Added to each feature; ``None`` for nothing.
        eps: Added to the variance.

    Source:
        Ba et al. 2016, arXiv:1607.06450, equation 4.
    """
    return cast(Tensor, _operation(x, weight, bias, eps))


def supported(x: Tensor) -> str | None:
    """Return why the kernel cannot take an input, or nothing if it can.

    Args:
        x: Features.
    """
    return unsupported_rows(x)


@jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, scale_ptr, x_stride, num_rows, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < SIZE)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1, keep_dims=True) / SIZE
    centred = tl.where(columns < SIZE, x - mean, 0.0)
    scale = tl.math.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / SIZE + eps)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)
    y = centred * scale
    if WEIGHT:
        y = y * tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    if BIAS:
        y = y + tl.load(bias_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * SIZE + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, scale_ptr, grad_x_ptr, of_weight_ptr, of_bias_ptr,
    grad_stride, x_stride, num_rows, rows_per_program,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]
    if WEIGHT:
        weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
        of_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if BIAS:
        of_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in range(0, rows_per_program, ROWS):
        rows = (program * rows_per_program + step + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < num_rows) & (columns < SIZE)
        grad = tl.load(grad_ptr + rows * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        scale = tl.load(scale_ptr + rows, mask=rows < num_rows, other=0.0)
        unit = (x - mean) * scale
        if BIAS:
            of_bias += grad
        if WEIGHT:
            of_weight += grad * unit
            grad = grad * weight
        along = tl.sum(grad * unit, axis=1, keep_dims=True) / SIZE
        level = tl.sum(grad, axis=1, keep_dims=True) / SIZE
        grad_x = (grad - level - unit * along) * scale
        tl.store(grad_x_ptr + rows * SIZE + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if WEIGHT:
        total = tl.sum(of_weight, axis=0, keep_dims=True)
        tl.store(of_weight_ptr + program * SIZE + columns, total, mask=columns < SIZE)
    if BIAS:
        total = tl.sum(of_bias, axis=0, keep_dims=True)
        tl.store(of_bias_ptr + program * SIZE + columns, total, mask=columns < SIZE)


def _layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not use_triton("layer_norm", x.device, supported(x)):
        return _reference_forward(x, weight, bias, eps)
    y, mean, scale = _fake_forward(x)
    rows, size = rows_of(x), x.size(-1)
    settings = row_settings("layer_norm", size, x)
    launch(
        _forward_kernel, (-(-len(rows) // settings["ROWS"]),),
        rows, *(rows if part is None else part.contiguous() for part in (weight, bias)), y, mean, scale,
        rows.stride(0), len(rows), eps, SIZE=size, BLOCK=next_power_of_two(size),
        WEIGHT=weight is not None, BIAS=bias is not None, **settings,
    )  # fmt: skip
    return y, mean, scale


def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not use_triton("layer_norm", x.device, supported(x)):
        return _reference_backward(grad, x, weight, bias, mean, scale)
    rows, upstream, size = rows_of(x), rows_of(grad), x.size(-1)
    grad_x = x.new_empty(x.shape)
    settings = row_settings("layer_norm_backward", size, x)
    programs, per_program, of_weight = partial_sums(rows, settings)
    of_bias = torch.empty_like(of_weight)
    launch(
        _backward_kernel, (programs,),
        upstream, rows, rows if weight is None else weight.contiguous(), mean, scale, grad_x, of_weight, of_bias,
        upstream.stride(0), rows.stride(0), len(rows), per_program, SIZE=size, BLOCK=next_power_of_two(size),
        WEIGHT=weight is not None, BIAS=bias is not None, **settings,
    )  # fmt: skip
    first, second = (
        x.new_empty(0) if like is None else partial.sum(0).to(like.dtype)
        for partial, like in ((of_weight, weight), (of_bias, bias))
    )
    return grad_x, first, second


def _reference_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = at_least_float32(x)
    mean = wide.mean(dim=-1, keepdim=True)
    centred = wide - mean
    scale = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    y = centred * scale
    y = y if weight is None else y * at_least_float32(weight)
    y = y if bias is None else y + at_least_float32(bias)
    return y.to(x.dtype).contiguous(), mean.squeeze(-1), scale.squeeze(-1)


def _reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide, mean, scale = at_least_float32(grad), mean.unsqueeze(-1), scale.unsqueeze(-1)
    unit = (at_least_float32(x) - mean) * scale
    none = x.new_empty(0)
    of_bias = none if bias is None else wide.flatten(0, -2).sum(0).to(bias.dtype)
    of_weight = none.clone()
    if weight is not None:
        of_weight = (wide * unit).flatten(0, -2).sum(0).to(weight.dtype)
        wide = wide * at_least_float32(weight)
    centred = wide - wide.mean(dim=-1, keepdim=True) - unit * (wide * unit).mean(dim=-1, keepdim=True)
    return (centred * scale).to(x.dtype).contiguous(), of_weight, of_bias


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = x.shape[:-1], torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _fake_backward(grad: Tensor, x: Tensor, weight: Any, bias: Any, *_: Any) -> tuple[Tensor, ...]:
    parts = (x.new_empty(0) if part is None else part.new_empty(part.shape) for part in (weight, bias))
    return x.new_empty(x.shape), *parts


_operation = Operation(
    _layer_norm_forward,
    _layer_norm_backward,
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor scale, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda tensors, results: (*tensors, *results[1:]),
)

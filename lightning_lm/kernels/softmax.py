"""Softmax over the last axis, in one pass each way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lm.functional.dtypes import at_least_float32
from lightning_lm.kernels.runtime.backend import use_triton
from lightning_lm.kernels.runtime.launch import jit, launch, next_power_of_two
from lightning_lm.kernels.runtime.operation import Operation
from lightning_lm.kernels.runtime.rows import row_settings, rows_of, unsupported_rows

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["softmax", "supported"]


def softmax(x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
    """Return exponentials that sum to one over the last axis, computed in float32 and rounded once.

    A row of nothing but minus infinity, as of a query that may see no key, gives zeros and passes no NaN backward.

    Args:
        x: Scores.
    """
    return cast(Tensor, _operation(x))


def supported(x: Tensor) -> str | None:
    """Return why the kernel cannot take an input, or nothing if it can.

    Args:
        x: Scores.
    """
    return unsupported_rows(x)


@jit
def _forward_kernel(x_ptr, y_ptr, x_stride, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < SIZE)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=-float("inf")).to(tl.float32)
    peak = tl.max(x, axis=1, keep_dims=True)
    terms = tl.exp(x - tl.where(peak == -float("inf"), 0.0, peak))
    total = tl.sum(terms, axis=1, keep_dims=True)
    y = terms / tl.where(total == 0.0, 1.0, total)
    tl.store(y_ptr + rows * SIZE + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    grad_ptr, y_ptr, grad_x_ptr, grad_stride, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < SIZE)
    grad = tl.load(grad_ptr + rows * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + rows * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    grad_x = y * (grad - tl.sum(grad * y, axis=1, keep_dims=True))
    tl.store(grad_x_ptr + rows * SIZE + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _softmax_forward(x: Tensor) -> tuple[Tensor]:
    if not use_triton("softmax", x.device, supported(x)):
        forbidden = (x == -torch.inf).all(dim=-1, keepdim=True)
        return (at_least_float32(x).softmax(dim=-1).masked_fill(forbidden, 0.0).to(x.dtype).contiguous(),)
    rows, y = rows_of(x), x.new_empty(x.shape)
    settings = row_settings("softmax", x.size(-1), x)
    grid = (-(-len(rows) // settings["ROWS"]),)
    sizes = {"SIZE": x.size(-1), "BLOCK": next_power_of_two(x.size(-1))}
    launch(_forward_kernel, grid, rows, y, rows.stride(0), len(rows), **sizes, **settings)
    return (y,)


def _softmax_backward(grad: Tensor, y: Tensor) -> tuple[Tensor]:
    if not use_triton("softmax", y.device, supported(y)):
        wide, terms = at_least_float32(grad), at_least_float32(y)
        return ((terms * (wide - (wide * terms).sum(dim=-1, keepdim=True))).to(y.dtype).contiguous(),)
    rows, grad_x = rows_of(grad), y.new_empty(y.shape)
    settings = row_settings("softmax", y.size(-1), y)
    grid = (-(-len(rows) // settings["ROWS"]),)
    sizes = {"SIZE": y.size(-1), "BLOCK": next_power_of_two(y.size(-1))}
    launch(_backward_kernel, grid, rows, y, grad_x, rows.stride(0), len(rows), **sizes, **settings)
    return (grad_x,)


def _fake_forward(x: Tensor) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


def _fake_backward(grad: Tensor, y: Tensor) -> tuple[Any]:
    return (y.new_empty(y.shape),)


_operation = Operation(
    _softmax_forward,
    _softmax_backward,
    schema="(Tensor x) -> Tensor",
    backward_schema="(Tensor grad, Tensor y) -> Tensor",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda _, results: results,
)

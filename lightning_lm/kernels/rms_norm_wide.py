"""`rms_norm` of rows that are too long for the registers of one program: it loops over them, block by block.

A row is read twice each way, and the gradient of the gain is added up by programs of its own, each over some columns of
some rows, always in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_lm.kernels.runtime.launch import jit, launch

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["wide_backward", "wide_forward"]

_BLOCK, _NUM_WARPS = 4096, 8
_GAIN_BLOCK, _GAIN_ROWS, _GAIN_WARPS = 512, 8, 4
_MOST_CHUNKS = 64
"""Partial sums of a gain's gradient; with 32 or more blocks of columns that is enough programs for any GPU."""


@jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, scale_ptr, x_stride, residual_stride, eps, offset,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < SIZE, other=0.0)
        if RESIDUAL:
            other = tl.load(residual_ptr + row * residual_stride + columns, mask=columns < SIZE, other=0.0)
            x = (x.to(tl.float32) + other.to(tl.float32)).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row * SIZE + columns, x, mask=columns < SIZE)
        squares += x.to(tl.float32) * x.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(squares, axis=0) / SIZE + eps)
    tl.store(scale_ptr + row, scale)
    for start in range(0, SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < SIZE, other=0.0)
        if RESIDUAL:  # added again: what a program has stored, its other threads need not see yet
            other = tl.load(residual_ptr + row * residual_stride + columns, mask=columns < SIZE, other=0.0)
            x = (x.to(tl.float32) + other.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        y = x.to(tl.float32) * scale
        if ROUND:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        if WEIGHT:
            y = y * (tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32) + offset)
        tl.store(y_ptr + row * SIZE + columns, y.to(y_ptr.dtype.element_ty), mask=columns < SIZE)


@jit
def _input_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, weight_ptr, scale_ptr, grad_x_ptr, grad_stride, grad_sum_stride, x_stride, offset,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + row)
    products = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + row * grad_stride + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
        if WEIGHT:
            grad *= tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32) + offset
        products += grad * tl.load(x_ptr + row * x_stride + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    along = tl.sum(products, axis=0) * scale / SIZE
    for start in range(0, SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + row * grad_stride + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
        if WEIGHT:
            grad *= tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32) + offset
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
        grad_x = (grad - x * scale * along) * scale
        if RESIDUAL:
            direct = tl.load(grad_sum_ptr + row * grad_sum_stride + columns, mask=columns < SIZE, other=0.0)
            grad_x += direct.to(tl.float32)
        tl.store(grad_x_ptr + row * SIZE + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=columns < SIZE)


@jit
def _gain_kernel(
    grad_ptr, x_ptr, scale_ptr, partial_ptr, grad_stride, x_stride, num_rows, rows_per_program,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    columns = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in range(0, rows_per_program, ROWS):
        rows = (chunk * rows_per_program + step + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < num_rows) & (columns < SIZE)
        grad = tl.load(grad_ptr + rows * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        unit = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        unit = unit * tl.load(scale_ptr + rows, mask=rows < num_rows, other=0.0)
        if ROUND:
            unit = unit.to(x_ptr.dtype.element_ty).to(tl.float32)
        total += grad * unit
    total = tl.sum(total, axis=0, keep_dims=True)
    tl.store(partial_ptr + chunk * SIZE + columns, total, mask=columns < SIZE)


def wide_forward(
    rows: Tensor, other: Tensor | None, weight: Tensor | None, results: tuple[Tensor, Tensor, Tensor],
    *, eps: float, offset: float, round_first: bool,
) -> None:  # fmt: skip
    """Fill the results of `rms_norm`: what is normalised, the sum with the residual if there is one, and the scales.

    Args:
        rows: A matrix of contiguous rows.
        other: The residual, like it.
        weight: Gain, contiguous.
        results: To be filled.
        eps: Added to the mean square.
        offset: Added to the gain.
        round_first: Round before the gain.
    """
    y, total, scale = results
    second, gain = rows if other is None else other, rows if weight is None else weight
    launch(
        _forward_kernel, (len(rows),), rows, second, gain, total, y, scale, rows.stride(0), second.stride(0), eps,
        offset, SIZE=rows.size(1), BLOCK=_BLOCK, WEIGHT=weight is not None, RESIDUAL=other is not None,
        ROUND=round_first, num_warps=_NUM_WARPS,
    )  # fmt: skip


def wide_backward(
    upstream: Tensor, direct: Tensor | None, rows: Tensor, weight: Tensor | None, scale: Tensor, grad_x: Tensor,
    *, offset: float, round_first: bool,
) -> Tensor | None:  # fmt: skip
    """Fill the gradient of the input, and return that of the gain, in float32, if there is one.

    Args:
        upstream: Gradient of what was normalised, a matrix of contiguous rows.
        direct: Gradient of the sum with the residual, if there was one.
        rows: Input of the norm.
        weight: Gain, contiguous.
        scale: From forward.
        grad_x: To be filled.
        offset: As in forward.
        round_first: As in forward.
    """
    size, second = rows.size(1), upstream if direct is None else direct
    launch(
        _input_kernel, (len(rows),), upstream, second, rows, rows if weight is None else weight, scale, grad_x,
        upstream.stride(0), second.stride(0), rows.stride(0), offset, SIZE=size, BLOCK=_BLOCK,
        WEIGHT=weight is not None, RESIDUAL=direct is not None, num_warps=_NUM_WARPS,
    )  # fmt: skip
    if weight is None:
        return None
    per_chunk = -(-max(-(-len(rows) // _MOST_CHUNKS), 1) // _GAIN_ROWS) * _GAIN_ROWS
    chunks = -(-len(rows) // per_chunk)
    partial = torch.empty(chunks, size, dtype=torch.float32, device=rows.device)
    launch(
        _gain_kernel, (-(-size // _GAIN_BLOCK), chunks), upstream, rows, scale, partial, upstream.stride(0),
        rows.stride(0), len(rows), per_chunk, SIZE=size, BLOCK=_GAIN_BLOCK, ROWS=_GAIN_ROWS, ROUND=round_first,
        num_warps=_GAIN_WARPS,
    )  # fmt: skip
    return partial.sum(0)

"""Squared ReLU, the activation of Primer's feed-forward layers, in one pass each way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from jaxtyping import Float
from torch import Tensor

from lightning_lm.functional.dtypes import at_least_float32
from lightning_lm.kernels.runtime.backend import unsupported_dtype, use_triton
from lightning_lm.kernels.runtime.launch import jit, launch
from lightning_lm.kernels.runtime.operation import Operation
from lightning_lm.kernels.runtime.rows import pieces

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["relu_squared", "supported"]


def relu_squared(x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
    """Return ``max(x, 0) ** 2``, computed in float32 and rounded once.

    Its gradient needs nothing but the input: written as two operations of torch, it also keeps the ReLU.

    Args:
        x: Input of the activation. May be a slice of a wider tensor.

    Source:
        So et al. 2021, arXiv:2109.08668.
    """
    return cast(Tensor, _operation(x))


def supported(x: Tensor) -> str | None:
    """Return why the kernel cannot take an input, or nothing if it can.

    Args:
        x: Input of the activation.
    """
    return unsupported_dtype(x)


@jit
def _forward_kernel(x_ptr, out_ptr, x_stride, width, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    positive = tl.where(x < 0.0, 0.0, x)  # a maximum would hide NaN
    tl.store(out_ptr + row * width + columns, (positive * positive).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(grad_ptr, x_ptr, grad_x_ptr, grad_stride, x_stride, width, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    grad_x = 2.0 * tl.where(x < 0.0, 0.0, x) * grad
    tl.store(grad_x_ptr + row * width + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _relu_squared_forward(x: Tensor) -> tuple[Tensor]:
    if not use_triton("relu_squared", x.device, supported(x)):
        return (at_least_float32(x).relu().square().to(x.dtype).contiguous(),)
    out = x.new_empty(x.shape)
    (rows,), grid, options = pieces("relu_squared", x)
    launch(_forward_kernel, grid, rows, out, rows.stride(0), rows.size(1), **options)
    return (out,)


def _relu_squared_backward(grad: Tensor, x: Tensor) -> tuple[Tensor]:
    if not use_triton("relu_squared", x.device, supported(x)):
        return ((2 * at_least_float32(x).relu() * at_least_float32(grad)).to(x.dtype).contiguous(),)
    grad_x = x.new_empty(x.shape)
    (grads, rows), grid, options = pieces("relu_squared", grad, x)
    strides = grads.stride(0), rows.stride(0)
    launch(_backward_kernel, grid, grads, rows, grad_x, *strides, rows.size(1), **options)
    return (grad_x,)


def _fake_forward(x: Tensor) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


def _fake_backward(grad: Tensor, x: Tensor) -> tuple[Any]:
    return (x.new_empty(x.shape),)


_operation = Operation(
    _relu_squared_forward,
    _relu_squared_backward,
    schema="(Tensor x) -> Tensor",
    backward_schema="(Tensor grad, Tensor x) -> Tensor",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda tensors, _: tensors,
)

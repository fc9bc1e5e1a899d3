"""Gated units: the activation of one projection times another, in one pass each way and without writing to either."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_lm.functional.dtypes import at_least_float32
from lightning_lm.kernels.runtime.backend import register, unsupported_dtype, use_triton
from lightning_lm.kernels.runtime.launch import jit, launch
from lightning_lm.kernels.runtime.operation import Operation
from lightning_lm.kernels.runtime.rows import pieces

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["geglu", "supported", "swiglu"]


def swiglu(gate: Float[Tensor, "*batch size"], up: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
    """Return ``silu(gate) * up``, computed in float32 and rounded once.

    Args:
        gate: Input of the activation. May be a slice of a wider tensor.
        up: Factor of the activated gate.

    Source:
        Shazeer 2020, arXiv:2002.05202, equation 6.
    """
    return cast(Tensor, _operation(*_alike(gate, up), "silu"))


def geglu(
    gate: Float[Tensor, "*batch size"],
    up: Float[Tensor, "*batch size"],
    *,
    approximate: Literal["none", "tanh"] = "none",
) -> Float[Tensor, "*batch size"]:
    """Return ``gelu(gate) * up``, computed in float32 and rounded once.

    Args:
        gate: Input of the activation. May be a slice of a wider tensor.
        up: Factor of the activated gate.
        approximate: ``tanh`` for the approximation that Gemma and GPT-2 use.

    Source:
        Shazeer 2020, arXiv:2002.05202, equation 6; Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.
    """
    return cast(Tensor, _operation(*_alike(gate, up), "gelu" if approximate == "none" else "gelu_tanh"))


def supported(gate: Tensor) -> str | None:
    """Return why the kernel cannot take an input, or nothing if it can.

    Args:
        gate: Input of the activation.
    """
    return unsupported_dtype(gate)


@jit
def _activation(x, ACTIVATION: tl.constexpr):
    """Return the activation and its slope."""
    if ACTIVATION == "silu":
        share = 1.0 / (1.0 + tl.exp(-x))
        return x * share, share * (1.0 + x * (1.0 - share))
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return x * share, share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    near = tl.minimum(tl.maximum(x, -64.0), 64.0)  # further out the cube would overflow and nothing changes
    share = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (near + 0.044715 * near * near * near)))
    slope = 1.5957691216057308 * (1.0 + 0.134145 * near * near)
    return x * share, share + near * share * (1.0 - share) * slope


@jit
def _forward_kernel(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, width, blocks, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    active, _ = _activation(gate, ACTIVATION)
    tl.store(out_ptr + row * width + columns, (active * up).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, grad_stride, gate_stride, up_stride, width, blocks,
    BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    active, slope = _activation(gate, ACTIVATION)
    out = row * width + columns
    tl.store(grad_gate_ptr + out, (grad * up * slope).to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + out, (grad * active).to(grad_up_ptr.dtype.element_ty), mask=mask)


def _gated_unit_forward(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor]:
    if not use_triton("gated_unit", gate.device, supported(gate)):
        return ((_activated(at_least_float32(gate), activation)[0] * at_least_float32(up)).to(gate.dtype).contiguous(),)
    out = gate.new_empty(gate.shape)
    (gates, ups), grid, options = pieces("gated_unit", gate, up)
    strides = gates.stride(0), ups.stride(0)
    launch(_forward_kernel, grid, gates, ups, out, *strides, gates.size(1), ACTIVATION=activation, **options)
    return (out,)


def _gated_unit_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if not use_triton("gated_unit", gate.device, supported(gate)):
        active, slope = _activated(at_least_float32(gate), activation)
        wide = at_least_float32(grad)
        grads = wide * at_least_float32(up) * slope, wide * active
        return grads[0].to(gate.dtype).contiguous(), grads[1].to(up.dtype).contiguous()
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    matrices, grid, options = pieces("gated_unit", grad, gate, up)
    strides = (matrix.stride(0) for matrix in matrices)
    width = matrices[0].size(1)
    launch(_backward_kernel, grid, *matrices, grad_gate, grad_up, *strides, width, ACTIVATION=activation, **options)
    return grad_gate, grad_up


def _alike(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(gate.dtype, up.dtype)
    return gate.to(dtype), up.to(dtype)


def _activated(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the activation and its slope."""
    if activation == "silu":
        share = x.sigmoid()
        return F.silu(x), share * (1 + x * (1 - share))
    if activation == "gelu":
        share = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return x * share, share + x * (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)
    near, factor = x.clamp(-64, 64), 2 * math.sqrt(2 / math.pi)
    share = (factor * (near + 0.044715 * near**3)).sigmoid()
    slope = factor * (1 + 3 * 0.044715 * near.square())
    return x * share, share + near * share * (1 - share) * slope


def _fake_forward(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor]:
    return (gate.new_empty(gate.shape),)


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _saved(tensors: Any, results: Any) -> Any:
    return tensors


_operation = Operation(
    _gated_unit_forward,
    _gated_unit_backward,
    schema="(Tensor gate, Tensor up, str activation) -> Tensor",
    backward_schema="(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=_saved,
)
register("gated_unit", functions=["swiglu", "geglu"])

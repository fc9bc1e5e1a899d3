"""Rotary positions of queries and keys together, with their norms if the model has them, in one pass each way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lm.functional.dtypes import at_least_float32
from lightning_lm.functional.rope import require_head_axis, rotate
from lightning_lm.kernels.runtime.backend import unsupported_dtype, use_triton
from lightning_lm.kernels.runtime.launch import jit, launch, next_power_of_two
from lightning_lm.kernels.runtime.launch_settings import settings
from lightning_lm.kernels.runtime.operation import Operation

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["rope", "supported"]

_LARGEST_TILE = 16384
"""Features of all heads of a token that fit into the registers of one program."""

_MOST_PROGRAMS = 1056
"""Partial sums of the gains' gradients: 8 for each multiprocessor of an H100."""


def rope(
    q: Float[Tensor, "batch seq heads head_dim"],
    k: Float[Tensor, "batch seq kv_heads head_dim"],
    cos: Float[Tensor, "*batch seq 1 rotary_dim"],
    sin: Float[Tensor, "*batch seq 1 rotary_dim"],
    *,
    interleaved: bool = False,
    gains: tuple[Float[Tensor, " head_dim"], Float[Tensor, " head_dim"]] | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[Float[Tensor, "batch seq heads head_dim"], Float[Tensor, "batch seq kv_heads head_dim"]]:
    """Turn queries and keys by the angles of their positions, after an RMS norm of each head if gains are given.

    Computed in float32 and rounded once; the inputs are left alone. Any strides will do, so heads may come before
    positions in memory.

    Args:
        q: Queries.
        k: Keys.
        cos: From `functional.rope_table`, at the positions of the tokens; both features of a plane hold the same.
        sin: Like ``cos``; holds ``-sin`` for the first feature of a plane.
        interleaved: A plane is features ``(2i, 2i + 1)``; otherwise ``(i, i + planes)``.
        gains: Gains of the norms of queries and keys, less `offset`; ``None`` for no norms.
        eps: Added to the mean squares.
        offset: The gains are ``offset + weight``: 1 for Gemma.

    Source:
        Su et al. 2021, arXiv:2104.09864, equation 34; query and key norm: Henry et al. 2020, arXiv:2010.04245.
    """
    require_head_axis("q", q)
    require_head_axis("k", k)
    q_gain, k_gain = gains or (None, None)
    found: tuple[Tensor, Tensor] = _operation(q, k, cos, sin, q_gain, k_gain, interleaved, eps, offset)
    return found


def supported(q: Tensor, k: Tensor, cos: Tensor) -> str | None:
    """Return why the kernel cannot take some inputs, or nothing if it can.

    Args:
        q: Queries.
        k: Keys.
        cos: The table.
    """
    tile = next_power_of_two(max(q.size(2), 1)) * next_power_of_two(max(q.size(3), 1))
    if tile > _LARGEST_TILE:
        return f"{q.size(2)} heads of {q.size(3)} are more than {_LARGEST_TILE} features, rounded up to powers of two"
    if cos.ndim == 4 and cos.size(0) not in (1, q.size(0)):
        return f"tables for {cos.size(0)} rows and queries for {q.size(0)}"
    return unsupported_dtype(q) or unsupported_dtype(k)


@jit
def _coordinates(
    HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return heads, features, the other feature of the same plane, and which of them exist."""
    heads, features = tl.arange(0, TILE)[:, None], tl.arange(0, BLOCK)[None, :]
    if INTERLEAVED:
        other = features ^ 1
    else:
        other = tl.where(features < ROTARY // 2, features + ROTARY // 2, features - ROTARY // 2)
    other = tl.where(features < ROTARY, other, features)
    return heads, features, other, (heads < HEADS) & (features < DIM)


@jit
def _forward_heads(
    x_ptr, gain_ptr, out_ptr, cos, sin, head_stride, eps, offset,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    heads, features, other, mask = _coordinates(HEADS, DIM, ROTARY, INTERLEAVED, TILE, BLOCK)
    x = tl.load(x_ptr + heads * head_stride + features, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(x_ptr + heads * head_stride + other, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.math.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / DIM + eps)
        gain = tl.load(gain_ptr + features, mask=features < DIM, other=0.0).to(tl.float32) + offset
        other_gain = tl.load(gain_ptr + other, mask=features < DIM, other=0.0).to(tl.float32) + offset
        x, partner = x * scale * gain, partner * scale * other_gain
    rotated = tl.where(features < ROTARY, x * cos + partner * sin, x)
    tl.store(out_ptr + heads * DIM + features, rotated.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_heads(
    grad_ptr, x_ptr, gain_ptr, grad_x_ptr, cos, sin, grad_stride, head_stride, eps, offset,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the heads of a token, and return that of the gain."""
    heads, features, other, mask = _coordinates(HEADS, DIM, ROTARY, INTERLEAVED, TILE, BLOCK)
    grad = tl.load(grad_ptr + heads * grad_stride + features, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(grad_ptr + heads * grad_stride + other, mask=mask, other=0.0).to(tl.float32)
    grad = tl.where(features < ROTARY, grad * cos - partner * sin, grad)
    grad_gain = tl.zeros((1, BLOCK), dtype=tl.float32)
    if NORM:
        x = tl.load(x_ptr + heads * head_stride + features, mask=mask, other=0.0).to(tl.float32)
        scale = tl.math.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / DIM + eps)
        unit = x * scale
        grad_gain = tl.sum(grad * unit, axis=0, keep_dims=True)
        grad = grad * (tl.load(gain_ptr + features, mask=features < DIM, other=0.0).to(tl.float32) + offset)
        grad = (grad - unit * (tl.sum(grad * unit, axis=1, keep_dims=True) / DIM)) * scale
    tl.store(grad_x_ptr + heads * DIM + features, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    return grad_gain


@jit
def _forward_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_gain_ptr, k_gain_ptr, q_out_ptr, k_out_ptr,
    length, table_stride, q_batch, q_seq, q_head, k_batch, k_seq, k_head, eps, offset,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, position = token // length, token % length
    features = tl.arange(0, BLOCK)[None, :]
    angle = row * table_stride + position * ROTARY + features
    cos = tl.load(cos_ptr + angle, mask=features < ROTARY, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=features < ROTARY, other=0.0).to(tl.float32)
    _forward_heads(
        q_ptr + row * q_batch + position * q_seq, q_gain_ptr, q_out_ptr + token * Q_HEADS * DIM, cos, sin,
        q_head, eps, offset, Q_HEADS, DIM, ROTARY, INTERLEAVED, NORM, Q_TILE, BLOCK,
    )  # fmt: skip
    _forward_heads(
        k_ptr + row * k_batch + position * k_seq, k_gain_ptr, k_out_ptr + token * K_HEADS * DIM, cos, sin,
        k_head, eps, offset, K_HEADS, DIM, ROTARY, INTERLEAVED, NORM, K_TILE, BLOCK,
    )  # fmt: skip


@jit
def _backward_kernel(
    grad_q_ptr, grad_k_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, q_gain_ptr, k_gain_ptr, dq_ptr, dk_ptr, partial_ptr,
    length, tokens, tokens_per_program, table_stride, gq_batch, gq_seq, gq_head, gk_batch, gk_seq, gk_head,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, eps, offset,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, BLOCK)[None, :]
    q_total = tl.zeros((1, BLOCK), dtype=tl.float32)
    k_total = tl.zeros((1, BLOCK), dtype=tl.float32)
    first = program * tokens_per_program
    for token in range(first, tl.minimum(first + tokens_per_program, tokens)):
        row, position = token // length, token % length
        angle = row * table_stride + position * ROTARY + features
        cos = tl.load(cos_ptr + angle, mask=features < ROTARY, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=features < ROTARY, other=0.0).to(tl.float32)
        q_total += _backward_heads(
            grad_q_ptr + row * gq_batch + position * gq_seq, q_ptr + row * q_batch + position * q_seq, q_gain_ptr,
            dq_ptr + token * Q_HEADS * DIM, cos, sin, gq_head, q_head, eps, offset,
            Q_HEADS, DIM, ROTARY, INTERLEAVED, NORM, Q_TILE, BLOCK,
        )  # fmt: skip
        k_total += _backward_heads(
            grad_k_ptr + row * gk_batch + position * gk_seq, k_ptr + row * k_batch + position * k_seq, k_gain_ptr,
            dk_ptr + token * K_HEADS * DIM, cos, sin, gk_head, k_head, eps, offset,
            K_HEADS, DIM, ROTARY, INTERLEAVED, NORM, K_TILE, BLOCK,
        )  # fmt: skip
    if NORM:
        tl.store(partial_ptr + program * 2 * DIM + features, q_total, mask=features < DIM)
        tl.store(partial_ptr + program * 2 * DIM + DIM + features, k_total, mask=features < DIM)


def _rope_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    interleaved, eps, offset = options
    if not use_triton("rope", q.device, supported(q, k, cos)):
        q_wide, k_wide = (
            x if gain is None else _normalised(x, gain, eps, offset)[0] for x, gain in ((q, q_gain), (k, k_gain))
        )
        q_out, k_out = (rotate(at_least_float32(x), cos, sin, interleaved=interleaved) for x in (q_wide, k_wide))
        return q_out.to(q.dtype).contiguous(), k_out.to(k.dtype).contiguous()
    q, k = _dense_heads(q), _dense_heads(k)
    out = q.new_empty(q.shape), k.new_empty(k.shape)
    pointers, constants = _shared_arguments(q, k, cos, sin, q_gain, k_gain, interleaved)
    table_stride = constants.pop("table_stride")
    launch(
        _forward_kernel, (q.size(0) * q.size(1),), q, k, *pointers, *out, q.size(1), table_stride,
        *q.stride()[:3], *k.stride()[:3], eps, offset, **constants,
    )  # fmt: skip
    return out


def _rope_backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_gain, k_gain, interleaved, eps, offset = rest
    if not use_triton("rope", grad_q.device, supported(grad_q, grad_k, cos)):
        of_q = _reference_gradients(grad_q, q, (cos, sin), q_gain, *rest[2:])
        of_k = _reference_gradients(grad_k, k, (cos, sin), k_gain, *rest[2:])
        return of_q[0], of_k[0], of_q[1], of_k[1]
    grad_q, grad_k = _dense_heads(grad_q), _dense_heads(grad_k)
    q, k = grad_q if q is None else _dense_heads(q), grad_k if k is None else _dense_heads(k)
    dq, dk, tokens = q.new_empty(q.shape), k.new_empty(k.shape), q.size(0) * q.size(1)
    per_program = 1 if q_gain is None else max(-(-tokens // _MOST_PROGRAMS), 1)
    programs = -(-tokens // per_program)
    partial = torch.empty(0 if q_gain is None else programs, 2, q.size(3), dtype=torch.float32, device=q.device)
    pointers, constants = _shared_arguments(q, k, cos, sin, q_gain, k_gain, interleaved)
    table_stride = constants.pop("table_stride")
    launch(
        _backward_kernel, (programs,), grad_q, grad_k, q, k, *pointers, dq, dk, partial, q.size(1), tokens,
        per_program, table_stride, *grad_q.stride()[:3], *grad_k.stride()[:3], *q.stride()[:3], *k.stride()[:3],
        eps, offset, **constants,
    )  # fmt: skip
    if q_gain is None or k_gain is None:
        return dq, dk, q.new_empty(0), k.new_empty(0)
    of_gains = partial.sum(0)
    return dq, dk, of_gains[0].to(q_gain.dtype, copy=True), of_gains[1].to(k_gain.dtype, copy=True)


def _shared_arguments(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, interleaved: bool
) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the tables and gains, and the constants of a launch."""
    cos, sin = cos.contiguous(), sin.contiguous()
    gains = [cos if gain is None else gain.contiguous() for gain in (q_gain, k_gain)]
    dim, rotary = q.size(3), cos.size(-1)
    tiles = {"Q_TILE": next_power_of_two(q.size(2)), "K_TILE": next_power_of_two(k.size(2))}
    block = next_power_of_two(dim)
    default = {"num_warps": min(max(tiles["Q_TILE"] * block // 512, 1), 16)}
    chosen = settings("rope", (q.size(2), k.size(2), dim), q.dtype, device=q.device, default=default)
    return [cos, sin, *gains], {
        "table_stride": 0 if cos.numel() == q.size(1) * rotary else q.size(1) * rotary,
        "Q_HEADS": q.size(2), "K_HEADS": k.size(2), "DIM": dim, "ROTARY": rotary, "INTERLEAVED": interleaved,
        "NORM": q_gain is not None, "BLOCK": block, **tiles, **chosen,
    }  # fmt: skip


def _dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _normalised(x: Tensor, gain: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Return the heads after their norm, and the factor that made their mean square one."""
    wide = at_least_float32(x)
    scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return wide * scale * (at_least_float32(gain) + offset), scale


def _reference_gradients(
    grad: Tensor,
    x: Tensor | None,
    tables: tuple[Tensor, Tensor],
    gain: Tensor | None,
    interleaved: bool,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of heads and gain: the rotation back, and then that of the norm."""
    rotated = rotate(at_least_float32(grad), tables[0], -tables[1], interleaved=interleaved)
    if x is None or gain is None:
        return rotated.to(grad.dtype).contiguous(), grad.new_empty(0)
    _, scale = _normalised(x, gain, eps, offset)
    unit = at_least_float32(x) * scale
    of_gain = (rotated * unit).flatten(0, -2).sum(0).to(gain.dtype)
    rotated = rotated * (at_least_float32(gain) + offset)
    of_x = (rotated - unit * (rotated * unit).mean(dim=-1, keepdim=True)) * scale
    return of_x.to(x.dtype).contiguous(), of_gain


def _fake_forward(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_backward(
    grad_q: Tensor, grad_k: Tensor, q: Any, k: Any, cos: Any, sin: Any, q_gain: Any, k_gain: Any, *_: Any
) -> tuple[Tensor, ...]:
    of_gains = (grad_q.new_empty(0) if gain is None else gain.new_empty(gain.shape) for gain in (q_gain, k_gain))
    return grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape), *of_gains


def _saved(tensors: tuple[Tensor | None, ...], results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    q, k, *rest = tensors
    return (None, None, *rest) if tensors[4] is None else (q, k, *rest)


_operation = Operation(
    _rope_forward,
    _rope_backward,
    schema="(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_gain, Tensor? k_gain, bool interleaved, float eps,"
    " float offset) -> (Tensor, Tensor)",
    backward_schema="(Tensor grad_q, Tensor grad_k, Tensor? q, Tensor? k, Tensor cos, Tensor sin, Tensor? q_gain,"
    " Tensor? k_gain, bool interleaved, float eps, float offset) -> (Tensor, Tensor, Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=_saved,
    arrange=lambda grad_q, grad_k, q_gain, k_gain: (grad_q, grad_k, None, None, q_gain, k_gain),
    visible=2,
)

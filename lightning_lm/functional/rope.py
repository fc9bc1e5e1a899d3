"""Rotary position embedding: frequencies, their scalings for longer contexts, and the rotation itself.

A head of ``head_dim`` features is read as ``head_dim / 2`` planes. At position ``p`` plane ``i`` is turned by the angle
``p * frequency[i]``, so that a dot product of two turned vectors depends on the distance of their positions alone.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "llama3_frequencies",
    "ntk_base",
    "rope_frequencies",
    "rope_table",
    "rotate",
    "yarn_frequencies",
]


def rope_frequencies(rotary_dim: int, base: float = 10_000.0) -> Float[Tensor, "planes"]:
    """Return the angle per position of each plane, from 1 down to about ``1 / base`` radians, in float64.

    Args:
        rotary_dim: Features that are rotated; even.
        base: Ratio of the slowest to the fastest plane's period.

    Source:
        Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim
    return base**-exponents


def ntk_base(base: float, rotary_dim: int, factor: float) -> float:
    """Return the base that stretches the slowest plane by ``factor`` and leaves the fastest one alone.

    Source:
        "NTK-aware scaled RoPE" (bloc97, 2023), written out in Peng et al. 2023, arXiv:2309.00071, section 3.1.
    """
    return float(base * factor ** (rotary_dim / (rotary_dim - 2)))


def llama3_frequencies(
    frequencies: Float[Tensor, "planes"],
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context_length: int,
) -> Float[Tensor, "planes"]:
    """Slow the planes that turn rarely within the original context by ``factor``, and keep the fast ones.

    Args:
        frequencies: Angles per position, radians.
        factor: How much longer the new context is.
        low_freq_factor: Planes with fewer turns than this in the original context are slowed fully.
        high_freq_factor: Planes with more turns than this are kept.
        original_context_length: Positions the model was first trained on.

    Source:
        Llama 3.1 reference code (``apply_scaling``); Grattafiori et al. 2024, arXiv:2407.21783, section 3.4.2.
    """
    turns = original_context_length * frequencies / (2 * math.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / factor


def yarn_frequencies(
    frequencies: Float[Tensor, "planes"],
    *,
    base: float,
    factor: float,
    original_context_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Float[Tensor, "planes"]:
    """Interpolate slow planes, keep fast ones, and ramp linearly over the plane's index in between.

    Args:
        frequencies: Angles per position, radians.
        base: The base they were made with; the ramp is laid over the planes' indices.
        factor: How much longer the new context is.
        original_context_length: Positions the model was first trained on.
        beta_fast: Planes with more turns than this in the original context are kept.
        beta_slow: Planes with fewer turns than this are slowed fully.

    Source:
        Peng et al. 2023, arXiv:2309.00071, equations 17-20 (the ramp's ends are rounded outwards, as in its code).
    """
    planes = len(frequencies)

    def plane_with(turns: float) -> float:
        return planes * math.log(original_context_length / (turns * 2 * math.pi)) / math.log(base)

    first = max(math.floor(plane_with(beta_fast)), 0)
    last = min(math.ceil(plane_with(beta_slow)), 2 * planes - 1)
    index = torch.arange(planes, dtype=frequencies.dtype, device=frequencies.device)
    slow = ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    return slow * frequencies / factor + (1 - slow) * frequencies


def rope_table(
    frequencies: Float[Tensor, "planes"], length: int, *, scale: float = 1.0
) -> tuple[Float[Tensor, "length planes"], Float[Tensor, "length planes"]]:
    """Return cosines and sines of every angle up to a length, in float32.

    Args:
        frequencies: Angles per position, radians; float64 keeps the angles of far positions exact.
        length: Number of positions.
        scale: Multiplies both (YaRN's attention temperature).
    """
    angles = torch.arange(length, dtype=torch.float64, device=frequencies.device)[:, None] * frequencies.double()
    return (angles.cos() * scale).float(), (angles.sin() * scale).float()


def rotate(
    x: Float[Tensor, "batch seq heads head_dim"],
    cos: Float[Tensor, "*positions planes"],
    sin: Float[Tensor, "*positions planes"],
    *,
    interleaved: bool = False,
) -> Float[Tensor, "batch seq heads head_dim"]:
    """Turn each plane of each head by the angle of its position.

    Args:
        x: Queries or keys.
        cos: Cosines, ``[seq, planes]`` for all rows or ``[batch, seq, planes]``. With fewer than ``head_dim / 2``
            planes the features behind them are left alone.
        sin: Sines, like ``cos``.
        interleaved: A plane is features ``(2i, 2i + 1)``; otherwise ``(i, i + planes)``.

    Source:
        Su et al. 2021, arXiv:2104.09864, equation 34; the split into halves is that of GPT-NeoX.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if x.dtype != cos.dtype:
        return _Rotation.apply(x.to(cos.dtype), cos, sin, interleaved).to(x.dtype)
    return _Rotation.apply(x, cos, sin, interleaved) if x.requires_grad else _turn(x, cos, sin, interleaved)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Write ``(a cos - b sin, b cos + a sin)`` straight into the result, for each plane ``(a, b)``."""
    result = torch.empty_like(x)
    rotary_dim = 2 * cos.size(-1)
    if rotary_dim < x.size(-1):
        result[..., rotary_dim:] = x[..., rotary_dim:]
    (a, b), (new_a, new_b) = _planes(x, rotary_dim, interleaved), _planes(result, rotary_dim, interleaved)
    torch.mul(a, cos, out=new_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=new_b).addcmul_(a, sin)
    return result


def _planes(x: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    return x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(upstream[0], cos, -sin, ctx.interleaved), None, None, None

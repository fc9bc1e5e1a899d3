"""Rotary position embedding: frequencies, their scalings for longer contexts, and the rotation itself.

A head of ``head_dim`` features is read as ``head_dim / 2`` planes. At position ``p`` plane ``i`` is rotated by
``p * frequency[i]``, so that a dot product of two rotated vectors depends on the distance of their positions alone.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lm.errors import ConfigurationError

__all__ = [
    "llama3_frequencies",
    "ntk_base",
    "rope_frequencies",
    "rope_table",
    "rotate",
    "yarn_frequencies",
]


def rope_frequencies(rotary_dim: int, base: float = 10_000.0) -> Float[Tensor, " planes"]:
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

    Args:
        base: Ratio of the slowest to the fastest plane's period before.
        rotary_dim: Features that are rotated.
        factor: Ratio of the new context length to the original one.

    Source:
        "NTK-aware scaled RoPE" (bloc97, 2023), written out in Peng et al. 2023, arXiv:2309.00071, section 3.1.
    """
    return float(base * factor ** (rotary_dim / (rotary_dim - 2)))


def llama3_frequencies(
    frequencies: Float[Tensor, " planes"],
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context_length: int,
) -> Float[Tensor, " planes"]:
    """Slow the planes that turn rarely within the original context by ``factor``, and keep the fast ones.

    Args:
        frequencies: Angles per position, radians.
        factor: Ratio of the new context length to the original one.
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
    frequencies: Float[Tensor, " planes"],
    *,
    base: float,
    factor: float,
    original_context_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Float[Tensor, " planes"]:
    """Interpolate slow planes, keep fast ones, and ramp linearly over the plane's index in between.

    Args:
        frequencies: Angles per position, radians.
        base: The base they were made with; the ramp is laid over the planes' indices.
        factor: Ratio of the new context length to the original one.
        original_context_length: Positions the model was first trained on.
        beta_fast: Planes with more turns than this in the original context are kept.
        beta_slow: Planes with fewer turns than this are slowed fully.
        truncate: Let the ramp begin and end at whole planes, rounded outwards, as the paper's code does.

    Source:
        Peng et al. 2023, arXiv:2309.00071, equations 17-20; ``truncate`` is in its code, and gpt-oss leaves it out.
    """
    planes = len(frequencies)

    def plane_with(turns: float) -> float:
        return planes * math.log(original_context_length / (turns * 2 * math.pi)) / math.log(base)

    first, last = plane_with(beta_fast), plane_with(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * planes - 1)
    index = torch.arange(planes, dtype=frequencies.dtype, device=frequencies.device)
    slow = ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    return slow * frequencies / factor + (1 - slow) * frequencies


def rope_table(
    frequencies: Float[Tensor, " planes"], length: int, *, scale: float = 1.0, interleaved: bool = False
) -> tuple[Float[Tensor, "length 1 rotary_dim"], Float[Tensor, "length 1 rotary_dim"]]:
    """Return the cosine of every angle up to a length and its sine with the sign of the feature, in float32.

    Both are spread over the two features of a plane, and have an axis of one for the heads, so that `rotate` is two
    products and a sum.

    Args:
        frequencies: Angles per position, radians; float64 keeps the angles of far positions exact.
        length: Number of positions.
        scale: Multiplies both (YaRN's attention temperature).
        interleaved: A plane is features ``(2i, 2i + 1)``; otherwise ``(i, i + planes)``.
    """
    angles = torch.arange(length, dtype=torch.float64, device=frequencies.device)[:, None] * frequencies.double()
    cos, sin = (angles.cos() * scale).float(), (angles.sin() * scale).float()
    axis = -1 if interleaved else -2
    pairs = torch.stack((cos, cos), dim=axis), torch.stack((-sin, sin), dim=axis)
    return pairs[0].reshape(length, 1, -1), pairs[1].reshape(length, 1, -1)


def require_head_axis(name: str, x: Tensor) -> None:
    """Refuse queries or keys without an axis of heads, whose batch would be taken for positions.

    Args:
        name: Name of the argument.
        x: Must be [batch, seq, heads, head_dim].

    Raises:
        ConfigurationError: If it has not four axes.
    """
    if x.dim() != 4:
        raise ConfigurationError(
            f"{name} has shape {tuple(x.shape)}, and rotary embeddings need [batch, seq, heads, head_dim]. Of a single "
            "head make tensor.unsqueeze(2)."
        )


def rotate(
    x: Float[Tensor, "batch seq heads head_dim"],
    cos: Float[Tensor, "*batch seq 1 rotary_dim"],
    sin: Float[Tensor, "*batch seq 1 rotary_dim"],
    *,
    interleaved: bool = False,
) -> Float[Tensor, "batch seq heads head_dim"]:
    """Turn each plane ``(a, b)`` of each head to ``(a cos - b sin, b cos + a sin)``, in float32 or better.

    Args:
        x: Queries or keys.
        cos: From `rope_table`, at the positions of the tokens. Features from ``rotary_dim`` on are left alone.
        sin: Like ``cos``; holds ``-sin`` for the first feature of a plane.
        interleaved: As the tables were made.

    Source:
        Su et al. 2021, arXiv:2104.09864, equation 34; the split into halves is that of GPT-NeoX.
    """
    require_head_axis("x", x)
    rotary_dim = cos.size(-1)
    if rotary_dim < x.size(-1):
        rotated, rest = x.split([rotary_dim, x.size(-1) - rotary_dim], dim=-1)
        return torch.cat((rotate(rotated, cos, sin, interleaved=interleaved), rest), dim=-1)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x.roll(rotary_dim // 2, -1)
    return (x * cos).addcmul_(swapped, sin).to(x.dtype)

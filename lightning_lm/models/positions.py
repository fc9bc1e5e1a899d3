"""Positional encodings: rotary parts with their scalings, learned and sinusoidal tables."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.rope import llama3_frequencies, ntk_base, rope_frequencies, rope_table, yarn_frequencies
from lightning_lm.models.roles import with_role
from lightning_lm.parts import Limit, Part

__all__ = [
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "NTKScaling",
    "PositionTable",
    "Positions",
    "Rope",
    "RopeScaling",
    "RotaryTable",
    "SinusoidalPositions",
    "SinusoidalTable",
    "YaRNScaling",
]


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Part, limits={"factor": Limit.POSITIVE}):
    """Base of the ways to stretch rotary positions over a longer context.

    Args:
        factor: Ratio of the new context length to the original one.
    """

    factor: float = 1.0

    @property
    def table_scale(self) -> float:
        """Factor of cosines and sines."""
        return 1.0

    def frequencies(self, rotary_dim: int, base: float) -> Float[Tensor, "planes"]:
        """Return the angle per position of each plane, radians."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    """Divide every position by the factor.

    Source:
        Chen et al. 2023, arXiv:2306.15595, section 2.3.
    """

    def frequencies(self, rotary_dim: int, base: float) -> Float[Tensor, "planes"]:
        """Return the angle per position of each plane, radians."""
        return rope_frequencies(rotary_dim, base) / self.factor


@dataclass(frozen=True, kw_only=True)
class NTKScaling(RopeScaling):
    """Enlarge the base so that the slowest plane is stretched by the factor and the fastest is not touched.

    Source:
        See `functional.rope.ntk_base`.
    """

    def frequencies(self, rotary_dim: int, base: float) -> Float[Tensor, "planes"]:
        """Return the angle per position of each plane, radians."""
        return rope_frequencies(rotary_dim, ntk_base(base, rotary_dim, self.factor))


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(
    RopeScaling,
    limits={
        "low_freq_factor": Limit.POSITIVE,
        "high_freq_factor": Limit.POSITIVE,
        "original_context_length": Limit.COUNT,
    },
):
    """Slow only the planes that turn rarely, as Llama 3.1 does. See `functional.rope.llama3_frequencies`.

    Args:
        factor: Ratio of the new context length to the original one.
        low_freq_factor: Planes with fewer turns than this in the original context are slowed fully.
        high_freq_factor: Planes with more turns than this are kept.
        original_context_length: Positions the model was first trained on.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def frequencies(self, rotary_dim: int, base: float) -> Float[Tensor, "planes"]:
        """Return the angle per position of each plane, radians."""
        return llama3_frequencies(
            rope_frequencies(rotary_dim, base),
            factor=self.factor,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
            original_context_length=self.original_context_length,
        )


@dataclass(frozen=True, kw_only=True)
class YaRNScaling(
    RopeScaling,
    limits={
        "original_context_length": Limit.COUNT,
        "beta_fast": Limit.POSITIVE,
        "beta_slow": Limit.POSITIVE,
        "attention_factor": Limit.POSITIVE,
    },
):
    """Ramp from kept to interpolated planes, and sharpen attention. See `functional.rope.yarn_frequencies`.

    Args:
        factor: Ratio of the new context length to the original one.
        original_context_length: Positions the model was first trained on.
        beta_fast: Planes with more turns than this are kept.
        beta_slow: Planes with fewer turns than this are interpolated fully.
        attention_factor: Multiplies cosines and sines; ``None`` for ``0.1 ln(factor) + 1``.
        truncate: Let the ramp begin and end at whole planes.
    """

    factor: float = 4.0
    original_context_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def table_scale(self) -> float:
        """Factor of cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, rotary_dim: int, base: float) -> Float[Tensor, "planes"]:
        """Return the angle per position of each plane, radians."""
        return yarn_frequencies(
            rope_frequencies(rotary_dim, base),
            base=base,
            factor=self.factor,
            original_context_length=self.original_context_length,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            truncate=self.truncate,
        )


@dataclass(frozen=True, kw_only=True)
class Rope(Part, limits={"base": Limit.POSITIVE, "fraction": Limit.FRACTION}):
    """Rotary positions, a part of attention.

    Args:
        base: Ratio of the slowest to the fastest plane's period.
        fraction: Fraction of each head's features that is rotated.
        scaling: Scaling of the frequencies for a longer context; ``None`` leaves them.
        interleaved: Rotate features ``(2i, 2i + 1)`` together instead of ``(i, i + half)``.

    Source:
        Su et al. 2021, arXiv:2104.09864.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    scaling: RopeScaling | None = None
    interleaved: bool = False

    def rotary_dim(self, head_dim: int) -> int:
        """Return how many features of a head are rotated.

        Raises:
            ConfigurationError: If that number is not even and between 2 and ``head_dim``.
        """
        size = int(head_dim * self.fraction)
        if size % 2 or not 0 < size <= head_dim:
            raise ConfigurationError(
                f"Rope(fraction={self.fraction}) rotates {size} of head_dim={head_dim} features; "
                "an even number from 2 to head_dim is needed. Change fraction or head_dim."
            )
        return size

    def table(self, head_dim: int, length: int) -> tuple[Tensor, Tensor]:
        """Return what `functional.rope.rotate` needs for all positions below ``length``."""
        size = self.rotary_dim(head_dim)
        if self.scaling is None:
            return rope_table(rope_frequencies(size, self.base), length, interleaved=self.interleaved)
        frequencies, scale = self.scaling.frequencies(size, self.base), self.scaling.table_scale
        return rope_table(frequencies, length, scale=scale, interleaved=self.interleaved)


class RotaryTable:
    """The cosines and sines of one `Rope`, made when first needed and shared by all layers that use it.

    It is no buffer on purpose: it must stay in float32 when a model is cast, is worth nothing in a checkpoint, and
    leaves nothing to fill in where a model was made on the meta device.

    Args:
        rope: The part.
        head_dim: Features of a head.
        length: Positions to prepare; the table grows when more are asked for.
    """

    def __init__(self, rope: Rope, head_dim: int, length: int) -> None:
        rope.rotary_dim(head_dim)
        self.rope, self.head_dim, self.length = rope, head_dim, length
        self._table: tuple[Tensor, Tensor] | None = None

    def __call__(self, positions: slice | Tensor, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines at positions that are all below ``length``."""
        table = self._table
        if table is None or table[0].device != device or len(table[0]) < length:
            self.length = max(self.length, length)
            with torch.inference_mode(False):  # a table first made in validation serves training too
                cos, sin = self.rope.table(self.head_dim, self.length)
                table = self._table = (cos.to(device), sin.to(device))
        return table[0][positions], table[1][positions]


@dataclass(frozen=True, kw_only=True)
class Positions(Part):
    """Base of the absolute positions, which are added to the token embeddings."""

    def build(self, d_model: int, context_length: int) -> nn.Module:
        """Return a module that maps ``(positions, upper bound, device)`` to features; positions are ids or a slice."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LearnedPositions(Positions):
    """One learned vector per position.

    Source:
        Radford et al. 2018 (GPT); Gehring et al. 2017, arXiv:1705.03122, section 3.1.
    """

    def build(self, d_model: int, context_length: int) -> nn.Module:
        """Return a module that maps ``(positions, upper bound, device)`` to features; positions are ids or a slice."""
        return PositionTable(context_length, d_model)


@dataclass(frozen=True, kw_only=True)
class SinusoidalPositions(Positions, limits={"base": Limit.POSITIVE}):
    """Fixed sines and cosines of geometrically spaced wavelengths.

    Args:
        base: Ratio of the longest to the shortest wavelength.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """

    base: float = 10_000.0

    def build(self, d_model: int, context_length: int) -> nn.Module:
        """Return a module that maps ``(positions, upper bound, device)`` to features; positions are ids or a slice."""
        return SinusoidalTable(d_model, context_length, base=self.base)


class PositionTable(nn.Module):
    """A learned vector per position.

    Args:
        context_length: Number of positions.
        d_model: Features of the residual stream.
    """

    def __init__(self, context_length: int, d_model: int) -> None:
        super().__init__()
        self.num_embeddings = context_length
        self.weight = nn.Parameter(torch.empty(context_length, d_model))
        with_role(self, "embedding")

    def forward(self, positions: slice | Tensor, length: int, device: torch.device) -> Tensor:  # noqa: ARG002
        """Return the features of positions that are all below ``length``.

        Raises:
            ConfigurationError: If there are not that many positions.
        """
        if length > self.num_embeddings:
            raise ConfigurationError(
                f"{length} positions were asked of a model with context_length={self.num_embeddings} and learned "
                "positions. Shorten the input, or train with a larger context_length."
            )
        return self.weight[positions] if isinstance(positions, slice) else F.embedding(positions, self.weight)


class SinusoidalTable(nn.Module):
    """Fixed sines (even features) and cosines (odd features) per position, made when first needed.

    Args:
        d_model: Features of the residual stream; even.
        context_length: Positions to prepare; the table grows when more are asked for.
        base: Ratio of the longest to the shortest wavelength.
    """

    def __init__(self, d_model: int, context_length: int, *, base: float) -> None:
        super().__init__()
        if d_model % 2:
            raise ConfigurationError(f"SinusoidalPositions need an even d_model, got {d_model}.")
        self._table = RotaryTable(Rope(base=base, interleaved=True), d_model, context_length)

    def forward(self, positions: slice | Tensor, length: int, device: torch.device) -> Tensor:
        """Return the features of positions that are all below ``length``."""
        cos, sin = self._table(positions, length, device)
        return torch.stack((sin[..., 1::2], cos[..., 1::2]), dim=-1).flatten(-2).squeeze(-2)

"""Biases of attention scores by the distance of two tokens, shared by all layers: T5's buckets, ALiBi's slopes."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.positions import Positions
from lightning_lm.models.roles import with_role
from lightning_lm.parts import Limit

__all__ = ["ALiBi", "PositionBias", "RelativeBias", "alibi_slopes", "relative_buckets"]


class PositionBias(nn.Module):
    """Base of the modules that bias scores: ``forward(distance)``, [*, queries, keys] to [*, heads, queries, keys]."""


def relative_buckets(
    distance: Int[Tensor, "*pairs"], *, num_buckets: int, max_distance: int, bidirectional: bool
) -> Int[Tensor, "*pairs"]:
    """Return the bucket of each distance: one for each short distance, then logarithmically wider ones.

    Args:
        distance: Places that the key lies before the query; negative if it comes later.
        num_buckets: Number of buckets; in both directions half of them for each.
        max_distance: Distances from here on share the last bucket, in tokens.
        bidirectional: Keep apart whether the key comes later; otherwise later keys count as distance 0.

    Source:
        Raffel et al. 2020, arXiv:1910.10683, section 2.1.
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset, distance = torch.where(distance < 0, num_buckets, 0), distance.abs()
    distance = distance.clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = exact + (ratio * (num_buckets - exact)).long()
    return offset + torch.where(distance < exact, distance, wide.clamp(max=num_buckets - 1))


def alibi_slopes(num_heads: int) -> Float[Tensor, " heads"]:
    """Return the slope of each head: powers of ``2 ** (-8 / num_heads)``, as for the next smaller power of two.

    Args:
        num_heads: Number of heads.

    Source:
        Press et al. 2022, arXiv:2108.12409, section 3, and their code for other numbers than powers of two.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    between = [2 ** (-4 * (head + 1) / power) for head in range(0, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes + between)


@dataclass(frozen=True, kw_only=True)
class RelativeBias(
    Positions, limits={"num_heads": Limit.COUNT, "num_buckets": Limit.COUNT, "max_distance": Limit.COUNT}
):
    """A learned bias for each head and bucket of distances (T5).

    Args:
        num_heads: Heads of every attention layer.
        num_buckets: Number of buckets.
        max_distance: Distances from here on share the last bucket, in tokens.
        bidirectional: Keep apart whether a key comes before or after; ``True`` in encoders.

    Raises:
        ConfigurationError: If there are too few buckets.

    Source:
        Raffel et al. 2020, arXiv:1910.10683, section 2.1.
    """

    num_heads: int = field(kw_only=False)
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        exact = self.num_buckets // (4 if self.bidirectional else 2)
        if not 0 < exact < self.max_distance:
            raise ConfigurationError(
                f"num_buckets={self.num_buckets} keep distances below {exact} apart, and max_distance="
                f"{self.max_distance}. Use at least 4 buckets and a larger max_distance."
            )

    def build(self, d_model: int, context_length: int) -> nn.Module:  # noqa: ARG002
        """Return a module that maps distances to biases."""
        return RelativeBiasTable(self)


@dataclass(frozen=True, kw_only=True)
class ALiBi(Positions, limits={"num_heads": Limit.COUNT}):
    """A fixed penalty that grows with the distance, by a slope of each head.

    Args:
        num_heads: Heads of every attention layer.

    Source:
        Press et al. 2022, arXiv:2108.12409.
    """

    num_heads: int = field(kw_only=False)

    def build(self, d_model: int, context_length: int) -> nn.Module:  # noqa: ARG002
        """Return a module that maps distances to biases."""
        return LinearBias(self.num_heads)


class RelativeBiasTable(PositionBias):
    """T5's table of biases.

    Args:
        part: The description.
    """

    def __init__(self, part: RelativeBias) -> None:
        super().__init__()
        self.part = part
        self.weight = nn.Parameter(torch.empty(part.num_buckets, part.num_heads))
        with_role(self, "embedding")

    def forward(self, distance: Int[Tensor, "*batch queries keys"]) -> Float[Tensor, "*batch heads queries keys"]:
        """Return the bias of each score."""
        part = self.part
        buckets = relative_buckets(
            distance,
            num_buckets=part.num_buckets,
            max_distance=part.max_distance,
            bidirectional=part.bidirectional,
        )
        return F.embedding(buckets, self.weight).movedim(-1, -3)


class LinearBias(PositionBias):
    """ALiBi's penalties; without parameters.

    Args:
        num_heads: Heads of every attention layer.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, distance: Int[Tensor, "*batch queries keys"]) -> Float[Tensor, "*batch heads queries keys"]:
        """Return the bias of each score."""
        slopes = alibi_slopes(self.num_heads).to(distance.device)
        return -slopes[:, None, None] * distance.abs()[..., None, :, :]

"""Routers: the choice of the experts of a token."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.dtypes import at_least_float32
from lightning_lm.functional.experts import ExpertChoices, Score, route
from lightning_lm.models.roles import with_role
from lightning_lm.parts import Limit, Part

__all__ = ["Groups", "HashRouter", "Routed", "Router", "TopK"]


class Routed(NamedTuple):
    """Choices of a router, and what they were made from."""

    choices: ExpertChoices
    logits: Float[Tensor, "tokens experts"] | None
    """Logits in float32 or better; ``None`` from a router that learns nothing."""


@dataclass(frozen=True, kw_only=True)
class Router(Part, limits={"k": Limit.COUNT}):
    """Base of the routers.

    Args:
        k: Experts per token.
    """

    k: int = 2
    learns: ClassVar[bool] = True
    """False for a router without weights, whose load nothing can balance."""

    def check(self, num_experts: int) -> None:
        """Refuse a number of experts that does not fit.

        Args:
            num_experts: Experts of the layer.

        Raises:
            ConfigurationError: If a token would go to more experts than there are.
        """
        if self.k > num_experts:
            raise ConfigurationError(
                f"k={self.k} experts per token are more than num_experts={num_experts}; use k of at most {num_experts}."
            )

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """Return a module with ``forward(x, input_ids, bias)`` that returns `Routed`.

        Args:
            d_model: Features of the residual stream.
            num_experts: Experts of the layer.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Groups(Part, limits={"count": Limit.COUNT, "chosen": Limit.COUNT, "best": Limit.COUNT}):
    """Groups of neighbouring experts, few of which a token may use: its tokens travel to few devices.

    Args:
        count: Number of groups.
        chosen: Groups whose experts a token may use.
        best: Experts whose scores add up to the score of their group: 2 in DeepSeek-V3, 1 in DeepSeek-V2.

    Source:
        DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """

    count: int
    chosen: int
    best: int = 2


@dataclass(frozen=True, kw_only=True)
class TopK(Router, limits={"scale": Limit.FINITE}):
    """The ``k`` experts with the best scores.

    Args:
        k: Experts per token.
        score: ``softmax`` over all experts (Mixtral, Qwen3, OLMoE), ``sigmoid`` of each (DeepSeek-V3), or
            ``chosen_softmax``, a softmax over the logits of the chosen ones (GPT-OSS).
        normalise: Divide the weights of a token by their sum.
        scale: Factor on the weights. Unitless.
        groups: Groups of experts that limit the choice; ``None`` for none.
        bias: Give the router biases.

    Source:
        Shazeer et al. 2017, arXiv:1701.06538.
    """

    score: Score = "sigmoid"
    normalise: bool = True
    scale: float = 1.0
    groups: Groups | None = None
    bias: bool = False

    def check(self, num_experts: int) -> None:
        """Refuse a number of experts that does not fit.

        Args:
            num_experts: Experts of the layer.

        Raises:
            ConfigurationError: If it is smaller than ``k``, or the groups do not divide it or leave too few experts.
        """
        super().check(num_experts)
        if self.groups is None:
            return
        count, chosen, best = self.groups.count, self.groups.chosen, self.groups.best
        if num_experts % count:
            fitting = [str(size) for size in range(1, num_experts + 1) if num_experts % size == 0]
            raise ConfigurationError(
                f"Groups(count={count}) does not divide num_experts={num_experts}; use {', '.join(fitting)}."
            )
        size = num_experts // count
        if best > size:
            raise ConfigurationError(f"Groups(best={best}) is more than the {size} experts of a group; use {size}.")
        if not self.k <= chosen * size <= num_experts:
            least = -(-self.k // size)
            raise ConfigurationError(
                f"Groups(chosen={chosen}) of {count} groups of {size} leaves {chosen * size} experts for k={self.k}; "
                f"use chosen from {least} to {count}."
            )

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """Return a module with ``forward(x, input_ids, bias)`` that returns `Routed`."""
        return _LinearRouter(self, d_model, num_experts)


@dataclass(frozen=True, kw_only=True)
class HashRouter(Router, limits={"seed": Limit.NON_NEGATIVE}):
    """Experts by a hash of the token's id: there is nothing to learn, and a token always goes to the same experts.

    The weights are ``1 / k``. Ids are spread evenly over experts, whatever their frequencies.

    Args:
        k: Experts per token.
        seed: Seed of the hash.

    Source:
        Roller et al. 2021, arXiv:2106.04426, section 3.
    """

    seed: int = 0
    learns: ClassVar[bool] = False

    def build(self, d_model: int, num_experts: int) -> nn.Module:  # noqa: ARG002
        """Return a module with ``forward(x, input_ids, bias)`` that returns `Routed`."""
        return _HashRouter(self, num_experts)


class _LinearRouter(nn.Module):
    """Logits by a linear map, computed in float32 whatever the model's type and autocast."""

    def __init__(self, part: TopK, d_model: int, num_experts: int) -> None:
        super().__init__()
        with_role(self, "router")
        self.part = part
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = nn.Parameter(torch.empty(num_experts)) if part.bias else None

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        input_ids: Int[Tensor, " tokens"] | None,  # noqa: ARG002
        bias: Float[Tensor, " experts"] | None,
    ) -> Routed:
        part = self.part
        with torch.autocast(x.device.type, enabled=False):
            offset = None if self.bias is None else at_least_float32(self.bias)
            logits = F.linear(at_least_float32(x), at_least_float32(self.weight), offset)
            groups = None if part.groups is None else (part.groups.count, part.groups.chosen, part.groups.best)
            options: dict[str, Any] = {"normalise": part.normalise, "scale": part.scale, "groups": groups}
            return Routed(route(logits, part.k, score=part.score, bias=bias, **options), logits)


class _HashRouter(nn.Module):
    """Experts by token id."""

    def __init__(self, part: HashRouter, num_experts: int) -> None:
        super().__init__()
        self.part, self.num_experts = part, num_experts

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        input_ids: Int[Tensor, " tokens"] | None,
        bias: Float[Tensor, " experts"] | None,  # noqa: ARG002
    ) -> Routed:
        if input_ids is None:
            raise ConfigurationError(
                "HashRouter chooses experts by token ids, and this layer was called without any: on continuous inputs, "
                "or without the context of its model. Call the model with input_ids, or use TopK."
            )
        k, num_experts = self.part.k, self.num_experts
        mixed = _mixed(input_ids + self.part.seed * 0x9E3779B9)
        spread = torch.arange(k, device=x.device) * (num_experts // k)
        experts = (mixed[:, None] + spread) % num_experts
        return Routed(ExpertChoices(experts, torch.full_like(experts, 1 / k, dtype=torch.float32)), None)


def _mixed(numbers: Tensor) -> Tensor:
    """Return 31 bits of a hash of integers (the finaliser of MurmurHash3)."""
    mask = 0xFFFFFFFF
    numbers = numbers & mask
    for shift, factor in ((16, 0x45D9F3B), (16, 0x45D9F3B)):
        numbers = ((numbers ^ (numbers >> shift)) * factor) & mask
    return (numbers ^ (numbers >> 16)) & 0x7FFFFFFF

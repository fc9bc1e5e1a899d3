"""The gated feed-forward layer of gpt-oss, whose factors are clamped."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.experts.stacks import ExpertStack
from lightning_lm.models.ffn import GLU, GatedFeedForward
from lightning_lm.parts import Limit

__all__ = ["ClampedGLU", "ClampedGatedFeedForward", "clamped_glu"]


def clamped_glu(
    gate: Float[Tensor, "*tokens hidden"], up: Float[Tensor, "*tokens hidden"], *, slope: float, limit: float
) -> Float[Tensor, "*tokens hidden"]:
    """Return ``(up + 1) * gate * sigmoid(slope * gate)`` of factors that are clamped before.

    Args:
        gate: Clamped from above.
        up: Clamped from both sides.
        slope: Steepness of the sigmoid; 1.702 makes it close to GELU.
        limit: Largest value.

    Source:
        gpt-oss, arXiv:2508.10925, section 2.1.
    """
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(slope * gate)


@dataclass(frozen=True, kw_only=True)
class ClampedGLU(GLU, limits={"slope": Limit.POSITIVE, "limit": Limit.POSITIVE}):
    """Gated feed-forward with clamped factors, for single layers and for experts.

    Args:
        hidden_size: As in `GLU`.
        activation: Not used; must be ``silu``.
        bias: Give the projections biases.
        slope: Steepness of the sigmoid.
        limit: Largest value of the factors.

    Source:
        gpt-oss, arXiv:2508.10925, section 2.1.
    """

    slope: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation != "silu":
            raise ConfigurationError(f"ClampedGLU has its own activation; leave activation={self.activation} out.")

    def build(self, d_model: int) -> nn.Module:
        """Return a module that maps ``[batch, seq, d_model]`` to the same shape."""
        plain = super().build(d_model)
        hidden_size: int = plain.get_submodule("down").in_features  # type: ignore[assignment]
        return ClampedGatedFeedForward(self, d_model, hidden_size)

    def build_experts(self, d_model: int, num_experts: int, *, active_share: float) -> nn.Module:
        """Return a stack of such layers; see `lightning_lm.models.experts.stacks.build_experts`."""
        return _ClampedExperts(self, d_model, num_experts, active_share=active_share)


class ClampedGatedFeedForward(GatedFeedForward):
    """``down((up(x) + 1) * gate(x) * sigmoid(slope * gate(x)))`` of clamped factors.

    Args:
        part: The description.
        d_model: Features of the residual stream.
        hidden_size: Features between the projections.
    """

    def __init__(self, part: ClampedGLU, d_model: int, hidden_size: int) -> None:
        super().__init__(d_model, hidden_size, bias=part.bias)
        self.part = part

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """Transform each token by itself."""
        hidden = clamped_glu(self.gate(x), self.up(x), slope=self.part.slope, limit=self.part.limit)
        out: Tensor = self.down(hidden)
        return out


class _ClampedExperts(ExpertStack):
    """Experts of `ClampedGLU`."""

    def __init__(self, part: ClampedGLU, d_model: int, num_experts: int, *, active_share: float) -> None:
        super().__init__(part, d_model, num_experts, active_share=active_share)
        self.part = part

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the features between the projections."""
        return clamped_glu(gate, up, slope=self.part.slope, limit=self.part.limit)

"""Feed-forward layers: gated (SwiGLU, GEGLU, ReGLU) and plain."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lm.models.init import residual_output
from lightning_lm.parts import Limit, Part

__all__ = ["ACTIVATIONS", "FFN", "GLU", "MLP", "Activation", "FeedForward", "GatedFeedForward"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
}
"""The activations by name. ``relu2`` is the squared ReLU of So et al. 2021, arXiv:2109.08668."""


@dataclass(frozen=True, kw_only=True)
class FFN(Part):
    """Base of the feed-forward layers, which treat each token by itself."""

    def build(self, d_model: int) -> nn.Module:
        """Return a module that maps ``[batch, seq, d_model]`` to the same shape."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class GLU(FFN, limits={"hidden_size": Limit.COUNT}):
    """Gated feed-forward: one projection, activated, multiplies another.

    Args:
        hidden_size: Features between the projections; ``None`` for ``8/3 d_model`` rounded up to a multiple of 64,
            which has the parameters of a plain layer with ``4 d_model``.
        activation: ``silu`` makes SwiGLU, ``gelu`` GEGLU, ``relu`` ReGLU.
        bias: Give the projections biases.

    Source:
        Shazeer 2020, arXiv:2002.05202, equation 6.
    """

    hidden_size: int | None = None
    activation: Activation = "silu"
    bias: bool = False

    def build(self, d_model: int) -> nn.Module:
        """Return a module that maps ``[batch, seq, d_model]`` to the same shape."""
        hidden_size = self.hidden_size or 64 * -(-d_model * 8 // (3 * 64))
        return GatedFeedForward(d_model, hidden_size, activation=self.activation, bias=self.bias)


@dataclass(frozen=True, kw_only=True)
class MLP(FFN, limits={"hidden_size": Limit.COUNT}):
    """Plain feed-forward: up, activation, down.

    Args:
        hidden_size: Features between the projections; ``None`` for ``4 d_model``.
        activation: Name of the activation.
        bias: Give the projections biases.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.3.
    """

    hidden_size: int | None = None
    activation: Activation = "gelu"
    bias: bool = False

    def build(self, d_model: int) -> nn.Module:
        """Return a module that maps ``[batch, seq, d_model]`` to the same shape."""
        return FeedForward(d_model, self.hidden_size or 4 * d_model, activation=self.activation, bias=self.bias)


class GatedFeedForward(nn.Module):
    """``down(activation(gate(x)) * up(x))``.

    Args:
        d_model: Features of the residual stream.
        hidden_size: Features between the projections.
        activation: Name of the activation.
        bias: Give the projections biases.
    """

    parallel_plan: ClassVar = {"gate": "colwise", "up": "colwise", "down": "rowwise"}

    def __init__(self, d_model: int, hidden_size: int, *, activation: Activation = "silu", bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, hidden_size, bias=bias)
        self.up = nn.Linear(d_model, hidden_size, bias=bias)
        self.down = residual_output(nn.Linear(hidden_size, d_model, bias=bias))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """Transform each token by itself."""
        return cast(Tensor, self.down(self.activation(self.gate(x)) * self.up(x)))


class FeedForward(nn.Module):
    """``down(activation(up(x)))``.

    Args:
        d_model: Features of the residual stream.
        hidden_size: Features between the projections.
        activation: Name of the activation.
        bias: Give the projections biases.
    """

    parallel_plan: ClassVar = {"up": "colwise", "down": "rowwise"}

    def __init__(self, d_model: int, hidden_size: int, *, activation: Activation = "gelu", bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, hidden_size, bias=bias)
        self.down = residual_output(nn.Linear(hidden_size, d_model, bias=bias))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """Transform each token by itself."""
        return cast(Tensor, self.down(self.activation(self.up(x))))

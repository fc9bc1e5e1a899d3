"""Layers inside recurrent mixers: the short convolution before a recurrence, and the time step that decays its state.

Their parameters belong to channels or heads. Each stands in a small module of its own that initialises itself, so that
a model's `Init` and weight decay leave it alone, and tensor parallelism can cut it along its first dimension.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.functional.convolution import short_convolution
from lightning_lm.functional.rms_norm import rms_norm
from lightning_lm.models.roles import with_role

__all__ = ["Constants", "GroupNorm", "ShortConvolution", "Skip", "TimeStep", "unit_length"]

_SLOWEST, _FASTEST = 1e-3, 1e-1
"""Range of the time steps of new weights."""
_MOST = 16.0
"""Largest decay rate of new weights; the smallest is 1."""
_GOLDEN = (5**0.5 - 1) / 2


def unit_length(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Divide vectors by their Euclidean norm.

    Args:
        x: Vectors.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class ShortConvolution(nn.Module):
    """Causal convolution of each channel by itself.

    Args:
        channels: Features.
        width: Tokens that an output sees, the newest included.
        bias: Add a bias.
        silu: Apply the SiLU activation to the outputs.
    """

    def __init__(self, channels: int, width: int, *, bias: bool = False, silu: bool = True) -> None:
        super().__init__()
        with_role(self, "conv")
        self.silu = silu
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(
        self,
        x: Float[Tensor, "batch seq channels"],
        document_ids: Int[Tensor, "batch seq"] | None = None,
        tail: Float[Tensor, "batch before channels"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq channels"], Float[Tensor, "batch before channels"]]:
        """Return the outputs, and the inputs that the next tokens will see.

        Args:
            x: Inputs.
            document_ids: Documents of the tokens; ``None`` if each row is one.
            tail: Inputs before the first token; ``None`` for zeros.
        """
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out, tail = short_convolution(x, self.weight.to(x.dtype), bias, document_ids=document_ids, tail=tail)
        return F.silu(out) if self.silu else out, tail


class TimeStep(nn.Module):
    """Time step of each head, ``dt = softplus(x + dt_bias)``, and the logarithm of its decay, ``-exp(A_log) dt``.

    Initial rates and time steps cover the ranges that Mamba-2 draws them from, evenly instead of at random: rates from
    1 to 16, and time steps from 0.001 to 0.1 in an order that has nothing to do with the rates'.

    Args:
        num_heads: Heads.

    Source:
        Gu and Dao 2023, arXiv:2312.00752, section 3.6; Dao and Gu 2024, arXiv:2405.21060.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Spread rates and time steps over the heads."""
        heads = torch.arange(len(self.A_log), device=self.A_log.device, dtype=torch.float64)
        self.A_log.copy_((1 + (_MOST - 1) * (heads + 0.5) / len(heads)).log())
        steps = (math.log(_SLOWEST) + math.log(_FASTEST / _SLOWEST) * (heads * _GOLDEN + 0.5).frac()).exp()
        self.dt_bias.copy_(steps + (-torch.expm1(-steps)).log())  # inverse of softplus

    def forward(self, x: Float[Tensor, "batch seq heads"]) -> tuple[Tensor, Tensor]:
        """Return time steps and logarithms of decays, [batch, seq, heads], in float32 or better.

        Args:
            x: Time steps before the bias and the softplus.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        steps = F.softplus(x.to(dtype) + self.dt_bias.to(dtype))
        return steps, -self.A_log.to(dtype).exp() * steps


class Skip(nn.Module):
    """Inputs added to outputs, each head or channel times a weight of its own.

    Args:
        size: Heads or channels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*batch size dim"]) -> Float[Tensor, "*batch size dim"]:
        """Return the inputs times the weights.

        Args:
            x: Inputs, with features of a head on the last axis.
        """
        return x * self.weight[:, None].to(x.dtype)


class Constants(nn.Module):
    """Numbers of each head or channel that are not trained.

    Args:
        values: The numbers.
    """

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.values = tuple(values)
        self.weight = nn.Parameter(torch.empty(len(self.values)), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the numbers."""
        with torch.no_grad():
            self.weight.copy_(torch.tensor(self.values))


class GroupNorm(nn.Module):
    """RMS normalisation of groups of neighbouring features, with one gain per feature.

    Args:
        size: Features.
        group_size: Features that are normalised together.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, group_size: int, *, eps: float) -> None:
        super().__init__()
        self.group_size, self.eps = group_size, eps
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with a gain of one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """Normalise the last axis.

        Args:
            x: Features.
        """
        if x.size(-1) == self.group_size:
            return rms_norm(x, self.weight, eps=self.eps)
        groups = x.unflatten(-1, (-1, self.group_size))
        return rms_norm(groups, None, eps=self.eps).flatten(-2) * self.weight.to(x.dtype)

"""Normalisation layers, as parts. The modules are those of torch wherever torch has them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lm.functional.rms_norm import rms_norm
from lightning_lm.parts import Limit, Part

__all__ = ["GainRMSNorm", "LayerNorm", "NoNorm", "Norm", "OffsetRMSNorm", "RMSNorm"]


@dataclass(frozen=True, kw_only=True)
class Norm(Part):
    """Base of the normalisations."""

    def build(self, size: int) -> nn.Module:
        """Return the module that normalises the last ``size`` features."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm, limits={"eps": Limit.NON_NEGATIVE, "offset": Limit.FINITE}):
    """Divide by the root mean square, then multiply by a learned gain.

    Args:
        eps: Added to the mean square.
        offset: The gain is ``offset + weight``; Gemma uses 1 and starts its weights at 0.
        affine: Learn a gain.

    Source:
        Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """

    eps: float = 1e-6
    offset: float = 0.0
    affine: bool = True

    def build(self, size: int) -> nn.Module:
        """Return the module that normalises the last ``size`` features."""
        if self.offset and self.affine:
            return OffsetRMSNorm(size, eps=self.eps, offset=self.offset)
        return GainRMSNorm(size, eps=self.eps, elementwise_affine=self.affine)


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm, limits={"eps": Limit.NON_NEGATIVE}):
    """Subtract the mean, divide by the standard deviation, then multiply by a learned gain and add a bias.

    Args:
        eps: Added to the variance.
        bias: Add a bias.
        affine: Learn a gain (and a bias).

    Source:
        Ba et al. 2016, arXiv:1607.06450, equation 4.
    """

    eps: float = 1e-5
    bias: bool = True
    affine: bool = True

    def build(self, size: int) -> nn.Module:
        """Return the module that normalises the last ``size`` features."""
        return nn.LayerNorm(size, eps=self.eps, elementwise_affine=self.affine, bias=self.bias)


@dataclass(frozen=True, kw_only=True)
class NoNorm(Norm):
    """Leave the features as they are."""

    def build(self, size: int) -> nn.Module:  # noqa: ARG002
        """Return the module that normalises the last ``size`` features."""
        return nn.Identity()


class GainRMSNorm(nn.RMSNorm):
    """Torch's RMS normalisation, by our faster function."""

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """Normalise the last axis."""
        assert self.eps is not None
        return rms_norm(x, self.weight, eps=self.eps)


class OffsetRMSNorm(nn.Module):
    """RMS normalisation whose gain is ``offset + weight``, so that weight decay pulls it to the offset, not to 0.

    Args:
        size: Features that are normalised together.
        eps: Added to the mean square.
        offset: Gain of a zero weight.
    """

    def __init__(self, size: int, *, eps: float = 1e-6, offset: float = 1.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with a gain of one."""
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """Normalise the last axis."""
        return rms_norm(x, self.offset + self.weight, eps=self.eps)

"""Initial weights, as parts."""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_lm.models.roles import Role, parameter_roles
from lightning_lm.parts import Limit, Part

__all__ = ["DepthScaled", "FanIn", "Init", "Normal", "TruncatedNormal", "residual_output"]

Module = TypeVar("Module", bound=nn.Module)


def residual_output(module: Module) -> Module:
    """Mark a linear layer that writes to the residual stream, and return it. `DepthScaled` starts it smaller."""
    module.is_residual_output = True  # type: ignore[assignment]
    return module


def _inputs(weight: Tensor, role: Role) -> int:
    """Return how many numbers an output is a sum of; stacks of matrices are ``[stack, out, in]``."""
    return weight[0].numel() if role == "conv" else weight.size(-1)


@dataclass(frozen=True, kw_only=True)
class Init(Part):
    """Base of the initialisations: biases start at 0, norms at 1, convolutions as in torch; a subclass draws more."""

    def apply(self, model: nn.Module, *, num_layers: int, generator: torch.Generator | None = None) -> None:
        """Overwrite every parameter of a model.

        Args:
            model: Its norms reset themselves through ``reset_parameters``.
            num_layers: Depth, for schemes that look at it.
            generator: Source of the random numbers; ``None`` for torch's own.
        """
        roles = parameter_roles(model)
        for path, module in model.named_modules():
            if hasattr(module, "reset_buffers"):
                module.reset_buffers()
            direct = dict(module.named_parameters(recurse=False))
            if direct and all(parameter.dim() < 2 for parameter in direct.values()):
                module.reset_parameters()  # a norm
                continue
            depth = num_layers if getattr(module, "is_residual_output", False) else None
            for name, parameter in direct.items():
                role = roles.get(f"{path}.{name}" if path else name)
                if role == "vector":
                    nn.init.zeros_(parameter)
                elif role == "conv":  # few taps: a deviation made for wide matrices would silence what they read
                    bound = _inputs(parameter, role) ** -0.5
                    nn.init.uniform_(parameter, -bound, bound, generator=generator)
                elif role is not None:  # a tied weight is drawn once, under its first name
                    self.draw(parameter, role=role, depth=depth, generator=generator)

    def draw(self, weight: Tensor, *, role: Role, depth: int | None, generator: torch.Generator | None) -> None:
        """Fill one weight of two or more dimensions in place.

        Args:
            weight: ``[out, in]``, a stack of such, ``[out, in, width]`` of a convolution, or ``[ids, features]`` of an
                embedding.
            role: Role of the parameter.
            depth: Number of layers if its output is added to the residual stream, else ``None``.
            generator: Source of the random numbers.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Normal(Init, limits={"std": Limit.NON_NEGATIVE}):
    """The same normal distribution everywhere.

    Args:
        std: Standard deviation.

    Source:
        Radford et al. 2018 (GPT), section 4.1; Llama's configuration (``initializer_range``).
    """

    std: float = 0.02

    def draw(self, weight: Tensor, *, role: Role, depth: int | None, generator: torch.Generator | None) -> None:  # noqa: ARG002
        """Fill one weight of two or more dimensions in place."""
        nn.init.normal_(weight, std=self.std, generator=generator)


@dataclass(frozen=True, kw_only=True)
class DepthScaled(Init, limits={"std": Limit.NON_NEGATIVE}):
    """Normal, with what is added to the residual stream divided by ``sqrt(2 num_layers)``.

    The stream is a sum of two outputs per layer; this keeps its variance independent of the depth.

    Args:
        std: Standard deviation of the other weights.

    Source:
        Radford et al. 2019 (GPT-2), section 2.3.
    """

    std: float = 0.02

    def draw(self, weight: Tensor, *, role: Role, depth: int | None, generator: torch.Generator | None) -> None:  # noqa: ARG002
        """Fill one weight of two or more dimensions in place."""
        std = self.std if depth is None else self.std / math.sqrt(2 * depth)
        nn.init.normal_(weight, std=std, generator=generator)


@dataclass(frozen=True, kw_only=True)
class FanIn(Init, limits={"gain": Limit.NON_NEGATIVE, "embedding_std": Limit.NON_NEGATIVE}):
    """Normal with variance ``gain^2 / inputs``, so that features keep their size from layer to layer.

    Args:
        gain: Standard deviation of an output for inputs of standard deviation one.
        embedding_std: Standard deviation of embeddings, whose input is one id.

    Source:
        LeCun et al. 1998, "Efficient BackProp", section 4.6.
    """

    gain: float = 1.0
    embedding_std: float = 1.0

    def draw(self, weight: Tensor, *, role: Role, depth: int | None, generator: torch.Generator | None) -> None:  # noqa: ARG002
        """Fill one weight of two or more dimensions in place."""
        std = self.embedding_std if role == "embedding" else self.gain / math.sqrt(_inputs(weight, role))
        nn.init.normal_(weight, std=std, generator=generator)


@dataclass(frozen=True, kw_only=True)
class TruncatedNormal(
    Init,
    limits={"std": Limit.NON_NEGATIVE, "embedding_std": Limit.NON_NEGATIVE, "cutoff": Limit.POSITIVE},
):
    """Normal, cut off at a number of standard deviations.

    Args:
        std: Standard deviation of matrices; ``None`` for ``sqrt(2 / (inputs + outputs))``.
        embedding_std: Standard deviation of embeddings.
        cutoff: Largest value, in standard deviations.

    Source:
        The variance: Glorot and Bengio 2010, equation 12. Truncated, as Stanford's CS336 asks for it.
    """

    std: float | None = None
    embedding_std: float = 1.0
    cutoff: float = 3.0

    def draw(self, weight: Tensor, *, role: Role, depth: int | None, generator: torch.Generator | None) -> None:  # noqa: ARG002
        """Fill one weight of two or more dimensions in place."""
        fan_in, fan_out = _inputs(weight, role), weight.size(0 if role == "conv" else -2)
        std = self.embedding_std if role == "embedding" else self.std or math.sqrt(2 / (fan_in + fan_out))
        bound = self.cutoff * std
        nn.init.trunc_normal_(weight, std=std, a=-bound, b=bound, generator=generator)

"""Maximal update parametrisation (muP): initial weights and attention that leave the best learning rate in its place.

What a wide model needs is said relative to a small one, of ``base_width``, at which nothing changes: hyper-parameters
that were found there can be kept. `lightning_lm.optim.MuPRates` is the other half, the learning rates. No multiplier
enters the forward pass: the form of Yang et al.'s table 3 needs none, so kernels, fused losses and export know nothing.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.attention import Attention
from lightning_lm.models.init import DepthScaled, Init, Normal, TruncatedNormal
from lightning_lm.models.mixer import MixerModule
from lightning_lm.models.norms import Norm
from lightning_lm.models.roles import Role, parameter_roles
from lightning_lm.parts import Limit

__all__ = ["MuP", "MuPAttention"]

_POWERS: Mapping[Role, float] = {"matrix": -0.5, "head": -1.0, "router": -1.0}
"""Power of the width in the standard deviation. Tables, convolutions of single features and vectors keep theirs."""


@dataclass(frozen=True, kw_only=True)
class MuP(Init):
    """Initial weights of the maximal update parametrisation: equal to ``base`` at its width, smaller in wider models.

    Matrices shrink by the root of how much wider the model is, the head and routers by all of it. Every inner width
    (heads times ``head_dim``, ``hidden_size``) must grow with ``d_model``, as they do by default. Use it
    with `lightning_lm.optim.MuPRates` of the same ``base_width``, and with `MuPAttention` if heads become wider
    instead of more.

    Args:
        base_width: ``d_model`` of the model whose hyper-parameters are kept.
        base: Its initial weights, of one spread whatever the shape: `Normal`, `DepthScaled`, or `TruncatedNormal` with
            a ``std``.

    Raises:
        ConfigurationError: If ``base`` follows the shape by itself.

    Source:
        Yang et al. 2022 (Tensor Programs V), arXiv:2203.03466, table 3.
    """

    base_width: int = dataclasses.field(kw_only=False)
    base: Init = Normal()

    def __post_init__(self) -> None:
        if self.base_width < 1:
            raise ConfigurationError(f"base_width={self.base_width} is too small; use the d_model of a small model.")
        constant = isinstance(self.base, Normal | DepthScaled | TruncatedNormal) and getattr(self.base, "std", None)
        if not constant:
            raise ConfigurationError(
                f"MuP scales initial weights of one spread, and {self.base} follows the shapes by itself. Give Normal, "
                "DepthScaled, or TruncatedNormal with a std."
            )

    def apply(self, model: nn.Module, *, num_layers: int, generator: torch.Generator | None = None) -> None:
        """Overwrite every parameter of a model.

        Args:
            model: Has an embedding or a head, which tell its width.
            num_layers: Depth, for a base that looks at it.
            generator: Source of the random numbers.

        Raises:
            ConfigurationError: If a head is tied to an embedding, or nothing tells the width.
        """
        parameters, roles = dict(model.named_parameters()), parameter_roles(model)
        tables = {id(parameters[name]) for name, role in roles.items() if role == "embedding"}
        if any(isinstance(module, nn.Linear) and id(module.weight) in tables for module in model.modules()):
            raise ConfigurationError(
                "MuP gives embedding and head different weights and learning rates, and here one weight is both. Set "
                "tie_embeddings to false."
            )
        ends = [parameters[name] for name, role in roles.items() if role in ("embedding", "head")]
        if not ends:
            raise ConfigurationError("MuP cannot tell the width of a model that has neither an embedding nor a head.")
        self.base.apply(model, num_layers=num_layers, generator=generator)
        wider = ends[-1].size(1) / self.base_width
        with torch.no_grad():
            for name, role in roles.items():
                if role in _POWERS:
                    parameters[name].mul_(wider ** _POWERS[role])


@dataclass(frozen=True, kw_only=True)
class MuPAttention(Attention, limits={"base_head_dim": Limit.COUNT}):
    """Attention whose scores are divided by the width of a head instead of its root: they stay finite in wide heads.

    Queries and keys that have been trained are no longer independent, so their product grows with the width itself.

    Args:
        base_head_dim: Width of a head at which the scores are those of `Attention`.

    Raises:
        ConfigurationError: If ``scale`` is given too.

    Source:
        Yang et al. 2022, arXiv:2203.03466, definition 4.1.
    """

    base_head_dim: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        super().__post_init__()
        if self.scale is not None:
            raise ConfigurationError(f"MuPAttention finds its scale by itself; leave scale={self.scale} out.")

    def build(self, d_model: int, *, norm: Norm) -> MixerModule:
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        head_dim = self.head_dim or d_model // self.num_heads
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(Attention)}
        return Attention(**{**plain, "scale": self.base_head_dim**0.5 / head_dim}).build(d_model, norm=norm)

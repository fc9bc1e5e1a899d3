"""Maximal update parametrisation (muP): learning rates by role, so that those of a small model suit a wide one."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_lm.errors import ConfigurationError
from lightning_lm.optim.combined import CombinedOptimizer
from lightning_lm.optim.optimizers import AdamW, OptimizerPart, RoledParameter
from lightning_lm.parts import Limit

__all__ = ["MuPRates"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuPRates(OptimizerPart, limits={"width": Limit.COUNT}):
    """Any optimizer, with the learning rate of each role scaled by how much wider the model is than a small one.

    The optimizer defines the rule: AdamW divides that of matrices and of the head by the width and keeps that of
    embeddings and vectors. At ``base_width`` nothing changes, so a learning rate found there can be kept. Weight decay,
    which is multiplied by the learning rate, is scaled the other way: its strength stays. The first group logged is one
    whose learning rate is not scaled. Use it with `lightning_lm.models.MuP` of the same ``base_width``.

    Source:
        Yang et al. 2022 (Tensor Programs V), arXiv:2203.03466, table 3.
    """

    base_width: int
    """``d_model`` of the model whose learning rate is kept."""
    optimizer: OptimizerPart = AdamW()
    """Optimizer to scale, with the learning rate of the small model."""
    width: int | None = None
    """``d_model`` of this model; ``None`` to read it from the embedding or the head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_width < 1:
            raise ConfigurationError(f"base_width={self.base_width} is too small; use the d_model of a small model.")

    def build(self, model: nn.Module, roles: Mapping[str, str]) -> CombinedOptimizer:
        """Return one optimizer for all parameters of a model that need gradients.

        Args:
            model: Model whose parameters are optimized.
            roles: Role of each parameter by its name; `lightning_lm.models.parameter_roles` makes it.

        Raises:
            ConfigurationError: If no parameter needs a gradient, or one weight is embedding and head.
        """
        if _has_tied_head(model, roles):
            raise ConfigurationError(
                "MuPRates gives embedding and head different learning rates, and here one weight is both. Set "
                "tie_embeddings to false."
            )
        return super().build(model, roles)

    def children(self, parameters: Sequence[RoledParameter]) -> list[Optimizer]:
        """Return the optimizers of the small model, one set for each power of the width.

        Raises:
            ConfigurationError: If the width is unknown, or the optimizer has no rule.
        """
        wider = self._width(parameters) / self.base_width
        shares: dict[float, list[RoledParameter]] = defaultdict(list)
        for entry in parameters:
            shares[self.optimizer.width_power(entry.role)].append(entry)
        children = []
        for power in sorted(shares, key=abs):
            made = self.optimizer.children(shares[power])
            for group in (group for child in made for group in child.param_groups if power):
                group["lr"] *= wider**power
                group["weight_decay"] *= wider**-power
                group["name"] += f"_width^{power:g}"
            children += made
        return children

    def _width(self, parameters: Sequence[RoledParameter]) -> int:
        ends = [entry.parameter for entry in parameters if entry.role in ("embedding", "head")]
        if self.width is None and not ends:
            raise ConfigurationError(
                "MuPRates reads the width from an embedding or a head, and neither is trained here. Give width, the "
                "d_model of this model."
            )
        return self.width or ends[-1].size(1)


def _has_tied_head(model: nn.Module, roles: Mapping[str, str]) -> bool:
    """Return whether a linear layer has one of the embeddings as its weight."""
    tables = {id(parameter) for name, parameter in model.named_parameters() if roles.get(name) == "embedding"}
    return any(isinstance(module, nn.Linear) and id(module.weight) in tables for module in model.modules())

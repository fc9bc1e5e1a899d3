"""Optimizers as parts: which parameters they take follows from the parameters' roles."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lm.errors import ConfigurationError
from lightning_lm.optim.combined import CombinedOptimizer
from lightning_lm.optim.muon import MuonOptimizer, MuonScaling
from lightning_lm.parts import Limit, Part

__all__ = ["SGD", "AdamW", "Muon", "OptimizerPart", "RoledParameter"]


_WIDE_INPUTS = ("matrix", "head", "router")
"""Roles whose weights are multiplied with as many features as the model is wide."""


class RoledParameter(NamedTuple):
    """A parameter to train."""

    name: str
    parameter: nn.Parameter
    role: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerPart(Part, abc.ABC):
    """Base of every optimizer that YAML can name."""

    _usage: ClassVar[str] = (
        " It describes an optimizer: give {0}(lr=...) to a module, or make one with "
        "{0}(lr=...).build(model, lightning_lm.models.parameter_roles(model))."
    )

    def build(self, model: nn.Module, roles: Mapping[str, str]) -> CombinedOptimizer:
        """Return one optimizer for all parameters of a model that need gradients.

        Args:
            model: Model whose parameters are optimized.
            roles: Role of each parameter by its name; `lightning_lm.models.parameter_roles` makes it.

        Raises:
            ConfigurationError: If no parameter needs a gradient.
        """
        trained = [
            RoledParameter(name, parameter, roles[name])
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        if not trained:
            raise ConfigurationError("No parameter of the model needs a gradient; unfreeze some before training.")
        return CombinedOptimizer(self.children(trained))

    @abc.abstractmethod
    def children(self, parameters: Sequence[RoledParameter]) -> list[Optimizer]:
        """Return torch optimizers that together optimize these parameters, each of them once."""

    def width_power(self, role: str) -> float:
        """Return the power of the width by which `MuPRates` multiplies the learning rate of a role.

        Args:
            role: Role of a parameter.

        Raises:
            ConfigurationError: If that is not known for this optimizer.
        """
        raise ConfigurationError(
            f"{type(self).__name__} does not define how the learning rate of role {role!r} scales with the width. "
            "Define its width_power, or use AdamW, SGD or Muon."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(
    OptimizerPart,
    limits={
        "lr": Limit.NON_NEGATIVE,
        "betas": Limit.BELOW_ONE,
        "eps": Limit.NON_NEGATIVE,
        "weight_decay": Limit.NON_NEGATIVE,
    },
):
    """AdamW, fused where torch has it.

    Source:
        Loshchilov and Hutter 2017, arXiv:1711.05101; the defaults are those of Brown et al. 2020, arXiv:2005.14165.
    """

    lr: float = 6e-4
    """Peak learning rate. Unitless."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate at each step."""
    no_decay: tuple[str, ...] = ("vector",)
    """Roles without weight decay."""

    def children(self, parameters: Sequence[RoledParameter]) -> list[Optimizer]:
        """Return one AdamW with a group that decays and one that does not."""
        groups = _decay_groups("adamw", parameters, self.weight_decay, self.no_decay)
        fused = all(entry.parameter.device.type in ("cpu", "cuda") for entry in parameters)
        betas = (self.betas[0], self.betas[1])
        return [torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=fused)] if groups else []

    def width_power(self, role: str) -> float:
        """Return -1 for layers whose fan-in is the width of the model, else 0: each weight moves by the same step.

        Args:
            role: Role of a parameter.

        Source:
            Yang et al. 2022, arXiv:2203.03466, table 3, row "Adam LR".
        """
        return -1.0 if role in _WIDE_INPUTS else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(
    OptimizerPart,
    limits={"lr": Limit.NON_NEGATIVE, "momentum": Limit.NON_NEGATIVE, "weight_decay": Limit.NON_NEGATIVE},
):
    """Stochastic gradient descent with momentum."""

    lr: float = 0.1
    """Peak learning rate. Unitless."""
    momentum: float = 0.9
    """Momentum coefficient."""
    weight_decay: float = 0.0
    """L2 penalty: fraction of a weight that is added to its gradient."""

    def children(self, parameters: Sequence[RoledParameter]) -> list[Optimizer]:
        """Return one SGD with a group that decays and one that does not."""
        groups = _decay_groups("sgd", parameters, self.weight_decay, ("vector",))
        return [torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)] if groups else []

    def width_power(self, role: str) -> float:
        """Return 0 for matrices, -1 for the head and routers, 1 for vectors and embeddings.

        Args:
            role: Role of a parameter.

        Source:
            Yang et al. 2022, arXiv:2203.03466, table 3, row "SGD LR".
        """
        return 0.0 if role == "matrix" else -1.0 if role in _WIDE_INPUTS else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(
    OptimizerPart,
    limits={
        "lr": Limit.NON_NEGATIVE,
        "momentum": Limit.BELOW_ONE,
        "weight_decay": Limit.NON_NEGATIVE,
        "steps": Limit.COUNT,
    },
):
    """Muon for the matrices, AdamW for everything else."""

    lr: float = 0.02
    """Peak learning rate of the matrices. Unitless."""
    momentum: float = 0.95
    """Momentum coefficient."""
    nesterov: bool = True
    """Look ahead by one step of the momentum."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate at each step."""
    steps: int = 5
    """Newton-Schulz iterations."""
    scaling: MuonScaling = "original"
    """Scaling of the learning rate with the shape of the matrix."""
    adamw: AdamW = AdamW()
    """Takes the parameters that are no matrices."""

    def children(self, parameters: Sequence[RoledParameter]) -> list[Optimizer]:
        """Return a Muon for the role "matrix" and an AdamW for the others."""
        matrices = [entry for entry in parameters if entry.role == "matrix"]
        others = [entry for entry in parameters if entry.role != "matrix"]
        muon = [self._muon(matrices)] if matrices else []
        return [*muon, *self.adamw.children(others)]

    def width_power(self, role: str) -> float:
        """Return 0 for matrices, whose orthogonal step has the size of its shape; AdamW's for the others.

        Args:
            role: Role of a parameter.

        Source:
            Yang, Simon and Bernstein 2023, arXiv:2310.17813, condition 1: a step's largest singular value follows
            ``(rows / columns) ** 0.5``. ``match_adamw`` makes it grow with the root of the width.
        """
        if role != "matrix":
            return self.adamw.width_power(role)
        return 0.0 if self.scaling == "original" else -0.5

    def _muon(self, matrices: Sequence[RoledParameter]) -> MuonOptimizer:
        return MuonOptimizer(
            [{"params": _named(matrices), "name": "muon"}],
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            steps=self.steps,
            scaling=self.scaling,
        )


def _decay_groups(
    name: str, parameters: Sequence[RoledParameter], weight_decay: float, no_decay: Sequence[str]
) -> list[dict[str, Any]]:
    decayed = [entry for entry in parameters if entry.role not in no_decay]
    rest = [entry for entry in parameters if entry.role in no_decay]
    groups = [
        {"params": _named(decayed), "weight_decay": weight_decay, "name": name},
        {"params": _named(rest), "weight_decay": 0.0, "name": f"{name}_no_decay"},
    ]
    return [group for group in groups if group["params"]]


def _named(parameters: Sequence[RoledParameter]) -> list[tuple[str, nn.Parameter]]:
    return [(entry.name, entry.parameter) for entry in parameters]

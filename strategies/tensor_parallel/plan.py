"""Parallel plan of a model: the role of each module, read from the modules themselves, or given.

A plan maps names of modules (globs allowed) to roles. The settings of the strategy decide how a role is carried out.

=========  =====================================================================================================
role       meaning
=========  =====================================================================================================
embed      embedding; its rows (ids) are sharded
positions  adds the positions of a whole row to the residual stream
norm       works on each token of the residual stream independently
last_norm  the same, after which the residual stream ends
gather     contains a tensor-parallel region; its input is the residual stream
colwise    linear layer whose output features are sharded
rowwise    linear layer whose input features are sharded; its partial sums are reduced into the residual stream
qk_norm    normalises sharded heads, each independently or all together
channels   parameters of single heads or channels, along their first dimension; each rank has its own
head       output layer; its rows (ids) are sharded
partial    replicated within a tensor-parallel region; its gradients are all-reduced
=========  =====================================================================================================

Low-rank adapters of ``peft`` follow their linear layer: of a colwise layer ``B`` is sharded and ``A`` is partial, of a
rowwise one ``A`` is sharded and ``B`` works on each token.
"""

import fnmatch
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.protocols import HasParallelPlan

__all__ = ["ROLES", "Planned", "check_covered", "check_divides", "read_plan"]

ROLES = (
    "embed",
    "positions",
    "norm",
    "last_norm",
    "gather",
    "colwise",
    "rowwise",
    "qk_norm",
    "channels",
    "head",
    "partial",
)
_ADAPTED = {
    "colwise": {"base_layer": "colwise", "lora_A": "partial", "lora_B": "colwise"},
    "rowwise": {"base_layer": "rowwise", "lora_A": "rowwise", "lora_B": "norm"},
}
"""Roles within a linear layer with an adapter, by the role of the layer."""


class Planned(NamedTuple):
    """A module with a role."""

    name: str
    module: nn.Module
    role: str


def read_plan(model: nn.Module, given: Mapping[str, str] | None = None) -> list[Planned]:
    """Return every module that has a role, in the order of the model.

    Args:
        model: Contains modules with a ``parallel_plan``: names below them (globs) and roles.
        given: The same for modules without one; names from the model's root, where ``*`` stands for dots too.

    Raises:
        ConfigurationError: If an entry names no module or no role, or there is no plan at all.
    """
    modules = dict(model.named_modules())
    roles: dict[str, str] = {}
    for path, module in modules.items():
        if isinstance(module, HasParallelPlan):
            for pattern, role in module.parallel_plan.items():
                if getattr(module, pattern, module) is None:  # a part that this module was made without
                    continue
                roles.update(_matches(modules, f"{path}.{pattern}" if path else pattern, role, type(module).__name__))
    for pattern, role in (given or {}).items():
        roles.update(_matches(modules, pattern, role, "the strategy"))
    if not roles:
        raise ConfigurationError(
            f"No module of {type(model).__name__} has a parallel_plan, so nothing can be split. Give the strategy a "
            'plan (such as {"*.mlp.up_proj": "colwise", ...}), or use tensor_parallel_size=1.'
        )
    roles = _within_adapted(modules, roles)
    return [Planned(name, module, roles[name]) for name, module in modules.items() if name in roles]


def _within_adapted(modules: Mapping[str, nn.Module], roles: Mapping[str, str]) -> dict[str, str]:
    """Give the roles of maps that carry adapters to what they are made of."""
    found: dict[str, str] = {}
    for name, role in roles.items():
        if not hasattr(modules[name], "lora_A"):
            found[name] = role
            continue
        if role not in _ADAPTED:
            raise ConfigurationError(
                f"{name} carries an adapter, and its role {role!r} cannot be split with one; only colwise and rowwise "
                "maps can. Leave it out of Adapters(targets=...), or use tensor_parallel_size=1."
            )
        for child, its_role in _ADAPTED[role].items():
            inside = [path for path in modules if path.startswith(f"{name}.{child}.") or path == f"{name}.{child}"]
            found.update((path, its_role) for path in inside if isinstance(modules[path], nn.Linear))
    return found


def _matches(modules: Mapping[str, nn.Module], pattern: str, role: str, owner: str) -> dict[str, str]:
    if role not in ROLES:
        raise ConfigurationError(f"The plan of {owner} gives {pattern!r} the role {role!r}; use {', '.join(ROLES)}.")
    found = {name: role for name in modules if fnmatch.fnmatchcase(name, pattern)}
    if not found:
        raise ConfigurationError(
            f"The plan of {owner} names {pattern!r}, and there is no such module. Correct the name, or leave it out."
        )
    return found


def check_divides(model: nn.Module, size: int) -> None:
    """Refuse a number of ranks that would cut through what must stay whole.

    Args:
        model: Contains modules with ``parallel_divides``: names of numbers that the size must divide.
        size: Ranks that share a matrix.

    Raises:
        ConfigurationError: If one is not divided.
    """
    for module in model.modules():
        for name in getattr(module, "parallel_divides", ()):
            number: int = getattr(module, name)
            if number % size:
                fitting = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
                raise ConfigurationError(
                    f"tensor_parallel_size={size} does not divide {name}={number}; use {', '.join(fitting)}."
                )


def check_covered(model: nn.Module, plan: list[Planned], *, sequence_parallel: bool) -> None:
    """Refuse what would train with wrong gradients: parameters in a split region that the plan does not mention.

    Args:
        model: The whole.
        plan: Parallel plan of its modules.
        sequence_parallel: True if the residual stream between the split regions is sharded too.

    Raises:
        ConfigurationError: If there are any, or a region has no way out.
    """
    roles = {entry.name: entry.role for entry in plan}
    for entry in plan:
        if entry.role == "gather":
            inside = [name for name in roles if name.startswith(f"{entry.name}.")]
            if not any(roles[name] == "rowwise" for name in inside):
                raise ConfigurationError(
                    f"{entry.name} ({type(entry.module).__name__}) has no parallel_plan, so it cannot be split. Use "
                    "another layer, or tensor_parallel_size=1."
                )
            _require_roles(entry.name, entry.module, roles)
    if sequence_parallel:
        for name, module in model.named_modules():
            plan_of: Mapping[str, str] = getattr(module, "parallel_plan", {})
            if "embed" in plan_of.values():
                _require_roles(name, module, roles)


def _require_roles(path: str, module: nn.Module, roles: Mapping[str, str]) -> None:
    for name, child in module.named_modules(prefix=path):
        if name not in roles and next(child.parameters(recurse=False), None) is not None:
            raise ConfigurationError(
                f"{name} ({type(child).__name__}) lies in a region that is split and the plan does not mention it: its "
                "gradients would be wrong. Give it a role, or use tensor_parallel_size=1."
            )

"""Roles of parameters. Weight decay, optimizer routing, FLOP counts and parallel plans follow from this table.

A role is attached to the module that holds the parameter, when the module is made: module attributes survive copies,
``to_empty`` and sharding, which replace the parameters themselves. Modules of other libraries are understood too.
"""

from typing import Literal, TypeVar

from torch import nn

__all__ = ["Role", "parameter_roles", "with_role"]

Role = Literal["embedding", "head", "matrix", "vector", "router", "conv"]
"""``embedding``: a table looked up by id; ``head``: turns features into logits; ``matrix``: every other linear layer;
``vector``: gains and biases; ``router``: chooses experts; ``conv``: convolution kernels."""

Module = TypeVar("Module", bound=nn.Module)

_HEAD_NAMES = ("head", "lm_head", "output_projection", "embed_out")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def with_role(module: Module, role: Role) -> Module:
    """Give the matrices that a module itself holds a role, and return the module. Its 1-D parameters stay vectors.

    Args:
        module: Made by us, or of a kind that cannot be told by its class.
        role: Role of its matrices.
    """
    module.parameter_role = role  # type: ignore[assignment]
    return module


def parameter_roles(module: nn.Module) -> dict[str, Role]:
    """Return the role of every parameter by its name, as `nn.Module.named_parameters` spells it.

    Where no role was attached it is inferred: `nn.Embedding` holds embeddings, a linear layer called ``head`` or
    ``lm_head`` is the head, fewer than two dimensions make a vector, convolutions are ``conv``, the rest ``matrix``.
    A parameter that is shared appears once; the head tied to the embedding is an embedding.

    Args:
        module: A model, or a part of one.
    """
    roles: dict[str, Role] = {}
    names: dict[int, str] = {}
    for path, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            full_name = f"{path}.{name}" if path else name
            role = _role(child, path, parameter.dim())
            known = names.setdefault(id(parameter), full_name)
            if known == full_name or role == "embedding":
                roles[known] = role
    return roles


def _role(module: nn.Module, path: str, dimensions: int) -> Role:
    if dimensions < 2:
        return "vector"
    attached: Role | None = getattr(module, "parameter_role", None)
    if attached is not None:
        return attached
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, _CONVOLUTIONS):
        return "conv"
    return "head" if path.rpartition(".")[-1] in _HEAD_NAMES else "matrix"

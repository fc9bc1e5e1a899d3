"""Checks of shapes: tensors that would broadcast to a result of neither shape are refused, naming theirs."""

from collections.abc import Mapping

from torch import Tensor

from lightning_lm.errors import ConfigurationError

__all__ = ["require_aligned", "require_shape"]


def require_shape(axes: str, **tensors: Tensor) -> None:
    """Refuse tensors that do not have the same shape, with the given axes.

    Args:
        axes: Names of the axes, such as ``rows seq``; empty for any number of them.
        tensors: Tensors by the names of their arguments.

    Raises:
        ConfigurationError: If their shapes differ, or they have more or fewer axes.
    """
    shapes = {tensor.shape for tensor in tensors.values()}
    if len(shapes) > 1 or (axes and len(shapes.pop()) != len(axes.split())):
        raise _other_shapes(axes, tensors)


def require_aligned(**tensors: Tensor) -> None:
    """Refuse values with one vector per token, and token ids, whose tokens do not have the same shape.

    Args:
        tensors: The values, such as logits or hidden states, and then the ids, by the names of their arguments.

    Raises:
        ConfigurationError: If the shapes do not fit.
    """
    values, ids = tensors.values()
    if values.shape[:-1] != ids.shape:
        raise _not_aligned(tensors)


def _other_shapes(axes: str, tensors: Mapping[str, Tensor]) -> ConfigurationError:
    found = ", ".join(f"{name} has shape {tuple(tensor.shape)}" for name, tensor in tensors.items())
    needed = f" [{', '.join(axes.split())}]" if axes else ""
    return ConfigurationError(
        f"{found}; {'all need the same' if len(tensors) > 1 else 'it needs the'} shape{needed}, because others would "
        "broadcast to wrong results. Use x.squeeze(-1), or x[:, None].expand_as(y) for one value per row."
    )


def _not_aligned(tensors: Mapping[str, Tensor]) -> ConfigurationError:
    (name, values), (ids_name, ids) = tensors.items()
    return ConfigurationError(
        f"{name} has shape {tuple(values.shape)} and {ids_name} {tuple(ids.shape)}; {name} needs its axes and one "
        f"more, with the next token's id beside each position: {name}[:, :-1] and {ids_name}[:, 1:]."
    )

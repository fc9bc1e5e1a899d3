"""Checks of shapes: tensors that would broadcast to a result of neither shape are refused, naming theirs."""

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
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if any(shape != first for shape in shapes.values()) or (axes and len(first) != len(axes.split())):
        found = ", ".join(f"{name} has shape {shape}" for name, shape in shapes.items())
        needed = f" [{', '.join(axes.split())}]" if axes else ""
        raise ConfigurationError(
            f"{found}; {'all need' if len(shapes) > 1 else 'it needs'} the same shape{needed}, because other shapes "
            "would broadcast to wrong results. Use x.squeeze(-1), or x[:, None].expand_as(y) for one value per row."
        )


def require_aligned(**tensors: Tensor) -> None:
    """Refuse values with one vector per token, and token ids, whose tokens do not have the same shape.

    Args:
        tensors: The values, such as logits or hidden states, and then the ids, by the names of their arguments.

    Raises:
        ConfigurationError: If the shapes do not fit.
    """
    (name, values), (ids_name, ids) = tensors.items()
    if values.shape[:-1] != ids.shape:
        raise ConfigurationError(
            f"{name} has shape {tuple(values.shape)} and {ids_name} {tuple(ids.shape)}; {name} needs the axes of "
            f"{ids_name} and one more, with the next token's id beside each position: {name}[:, :-1] and "
            f"{ids_name}[:, 1:]."
        )

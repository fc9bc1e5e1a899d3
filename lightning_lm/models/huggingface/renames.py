"""Names and layouts of weights in ``transformers``: which of theirs holds which of ours, and how."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Flattened", "Joined", "PerGroup", "Rename", "Separated", "module_names", "of_stack", "renames_for"]


@dataclass(frozen=True)
class Joined:
    """Weights of ours that follow each other in theirs.

    Args:
        axis: Axis along which they follow each other.
    """

    axis: int = 0

    def split(self, tensor: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Return our weights from theirs.

        Args:
            tensor: Their weight.
            sizes: Length of each of ours along the axis.
        """
        if sum(sizes) != tensor.size(self.axis):  # then the shapes are wrong, which the caller says
            return tensor.tensor_split(len(sizes), self.axis)
        return tuple(torch.split(tensor, list(sizes), self.axis))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return their weight from ours.

        Args:
            tensors: Our weights.
        """
        return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), self.axis)


@dataclass(frozen=True)
class PerGroup(Joined):
    """Weights of ours that alternate in theirs, group after group: in each head its keys, then its values.

    Args:
        groups: Number of groups, such as heads.
    """

    groups: int = 1

    def split(self, tensor: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Return our weights from theirs; see `Joined.split`."""
        if sum(sizes) != tensor.size(self.axis):
            return super().split(tensor, sizes)
        grouped = tensor.unflatten(self.axis, (self.groups, -1))
        pieces = grouped.split([size // self.groups for size in sizes], self.axis + 1)
        return tuple(piece.flatten(self.axis, self.axis + 1) for piece in pieces)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return their weight from ours; see `Joined.join`."""
        grouped = [tensor.unflatten(self.axis, (self.groups, -1)) for tensor in tensors]
        return torch.cat(grouped, self.axis + 1).flatten(self.axis, self.axis + 1)


@dataclass(frozen=True)
class Separated(Joined):
    """Taps of separate channels, which ``nn.Conv1d`` stores as [channels, 1, width] and we as [channels, width]."""

    def split(self, tensor: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Return our weights from theirs; see `Joined.split`."""
        return super().split(tensor.squeeze(1), sizes)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return their weight from ours; see `Joined.join`."""
        return super().join(tensors).unsqueeze(1)


@dataclass(frozen=True)
class Flattened(PerGroup):
    """Vectors of ours that theirs holds as the rows of a matrix.

    Args:
        rows: Rows of theirs.
    """

    rows: int = 1

    def split(self, tensor: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Return our weights from theirs; see `Joined.split`."""
        return super().split(tensor.flatten(), sizes)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return their weight from ours; see `Joined.join`."""
        joined = super().join(tensors)
        return joined.view(self.rows, -1)


@dataclass(frozen=True)
class Rename:
    """One weight of theirs, and the one or more of ours that it holds.

    Args:
        theirs: Name in the file; ``{i}`` stands for the index of a layer.
        ours: Names in our state dict; ``name[3]`` is the fourth matrix of a stack.
        transposed: True if matrices are stored ``[in, out]``.
        layout: Order in which theirs holds several of ours.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    layout: Joined = Joined()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that hold our weights, whole or as stacks."""
        return tuple(name.partition("[")[0] for name in self.ours)

    def in_layer(self, index: int) -> "Rename":
        """Return the same for one layer."""
        ours = tuple(name.replace("{i}", str(index)) for name in self.ours)
        return replace(self, theirs=self.theirs.replace("{i}", str(index)), ours=ours)

    def split(self, tensor: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """Return our weights from theirs.

        Args:
            tensor: Their weight.
            shapes: Shapes of ours.
        """
        turned = self._turn(tensor)
        if turned.dim() <= self.layout.axis:
            return (turned,) * len(self.ours)
        return self.layout.split(turned, [shape[self.layout.axis] for shape in shapes])

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return their weight from ours.

        Args:
            tensors: Our weights.
        """
        return self._turn(self.layout.join(tensors))

    def _turn(self, tensor: Tensor) -> Tensor:
        return tensor.mT if self.transposed and tensor.dim() > 1 else tensor


def of_stack(name: str, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return a parameter, or the matrix of a stack that a name such as ``experts.up.weight[3]`` means.

    Args:
        name: One of `Rename.ours`.
        parameters: Parameters by name.
    """
    whole, _, index = name.partition("[")
    return parameters[whole][int(index[:-1])] if index else parameters[whole]


def renames_for(table: Sequence[Rename], names: Collection[str], num_layers: int) -> list[Rename]:
    """Return the entries of a table whose weights a model has, spelt out for every layer.

    Args:
        table: Table of a family.
        names: Names in the model's state dict.
        num_layers: Depth of the model.
    """
    spelt = [entry for item in table for entry in _in_each_layer(item, num_layers)]
    return [entry for entry in spelt if all(name in names for name in entry.parameters)]


def _in_each_layer(item: Rename, num_layers: int) -> list[Rename]:
    return [item.in_layer(index) for index in range(num_layers)] if "{i}" in item.theirs else [item]


def module_names(pairs: dict[str, str], *, transposed: bool = False) -> tuple[Rename, ...]:
    """Spell modules out to weights and biases. A model without a bias has no use for that line.

    Args:
        pairs: Their modules, and ours that each holds, parted by spaces.
        transposed: See `Rename`.
    """
    return tuple(
        Rename(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours.split()), transposed)
        for theirs, ours in pairs.items()
        for kind in ("weight", "bias")
    )

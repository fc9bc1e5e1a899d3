"""Partition of optimizer states over ranks, by parameter or by rows of a parameter."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["MIN_SPLIT_ELEMENTS", "Piece", "Placed", "Placement", "place", "rows_of"]

MIN_SPLIT_ELEMENTS = 2**20
"""Parameters with fewer elements are never split: a collective of their own would cost more than it balances."""


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of a parameter, updated by one rank."""

    rank: int
    start: int
    stop: int


Placement = tuple[Piece, ...]
"""One piece: the rank has the whole parameter. Several: the parameter is split by rows."""


class Placed(NamedTuple):
    """Size and cost of a parameter that is assigned to a rank."""

    shape: tuple[int, ...]
    splits: bool
    """True if its optimizer is elementwise, so that rows may be updated independently."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def rows(self) -> int:
        """Size of the first dimension; a scalar is one row."""
        return self.shape[0] if self.shape else 1


def place(
    parameters: Sequence[Placed],
    num_ranks: int,
    *,
    load: list[int] | None = None,
    min_split_elements: int = MIN_SPLIT_ELEMENTS,
) -> list[Placement]:
    """Partition parameters so that every rank has about equally many elements.

    Large parameters that allow it are split by rows, as ``torch.chunk`` cuts them; all others stay whole and go, the
    largest first, to the rank with the fewest elements.

    Args:
        parameters: Sizes, in the same order on every rank.
        num_ranks: Number of ranks.
        load: Elements that each rank has already; updated in place.
        min_split_elements: Size from which a parameter is split.

    Returns:
        The pieces of each parameter, in the order of the parameters.

    Source:
        Graham 1969, "Bounds on multiprocessing timing anomalies" (largest first).
    """
    load = [0] * num_ranks if load is None else load
    placements: list[Placement] = [()] * len(parameters)
    whole: list[int] = []
    for index, parameter in enumerate(parameters):
        splits = parameter.splits and num_ranks > 1 and parameter.rows > 1
        if splits and parameter.numel >= min_split_elements:
            placements[index] = _split(parameter.rows, num_ranks)
            for piece in placements[index]:
                load[piece.rank] += (piece.stop - piece.start) * (parameter.numel // parameter.rows)
        else:
            whole.append(index)
    for index in sorted(whole, key=lambda index: -parameters[index].numel):
        rank = load.index(min(load))
        load[rank] += parameters[index].numel
        placements[index] = (Piece(rank, 0, parameters[index].rows),)
    return placements


def rows_of(tensor: Tensor, piece: Piece) -> Tensor:
    """Return the rows of a piece, as a view."""
    return tensor[piece.start : piece.stop] if tensor.dim() else tensor


def _split(rows: int, num_ranks: int) -> Placement:
    size = -(-rows // num_ranks)
    starts = range(0, rows, size)
    return tuple(Piece(rank, start, min(rows, start + size)) for rank, start in enumerate(starts))

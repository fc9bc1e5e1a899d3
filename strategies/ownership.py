"""The part of an optimizer's parameters that this rank updates."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, distributed, nn

from lightning_lm.strategies.placement import Placed, Placement, place, rows_of
from lightning_lm.strategies.sharded_state import map_tensors

__all__ = ["Ownership"]


class Ownership:
    """Parameters shared out over ranks, and the part of this one.

    Args:
        min_split_elements: Size from which a parameter is split by rows, where its optimizer allows it.
        group: Ranks that share the parameters; by default all.

    Attributes:
        placements: Pieces of each parameter.
        rows: This rank's rows of each parameter that is split, as parameters of their own in the same memory.
    """

    def __init__(self, min_split_elements: int, group: distributed.ProcessGroup | None = None) -> None:
        self._min_split_elements, self.group = min_split_elements, group
        initialized = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank(group) if initialized else 0
        self.num_ranks = distributed.get_world_size(group) if initialized else 1
        self._load = [0] * self.num_ranks
        self.placements: dict[Tensor, Placement] = {}
        self.rows: dict[Tensor, nn.Parameter] = {}

    def take_in(self, params: Sequence[Tensor], splits: Sequence[bool]) -> None:
        """Share out more parameters; those that are there stay where they are.

        Args:
            params: In the same order on every rank.
            splits: True if rows of each may be updated apart from each other.
        """
        placed = [Placed(tuple(param.shape), may) for param, may in zip(params, splits, strict=True)]
        pieces = place(placed, self.num_ranks, load=self._load, min_split_elements=self._min_split_elements)
        self.placements.update(zip(params, pieces, strict=True))
        for param in params:
            if len(self.placements[param]) > 1:
                self._take_rows(param)

    def _take_rows(self, param: Tensor) -> None:
        for piece in self.placements[param]:
            if piece.rank == self.rank:
                self.rows[param] = nn.Parameter(rows_of(param.detach(), piece))

    def local(self, param: Tensor) -> Tensor | None:
        """Return what of a parameter this rank updates: all, some rows as a parameter of their own, or ``None``."""
        pieces = self.placements[param]
        if len(pieces) == 1:
            return param if pieces[0].rank == self.rank else None
        return self.rows.get(param)

    def locals(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return what of several parameters this rank updates."""
        return [part for param in params if (part := self.local(param)) is not None]

    def with_rows(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return parameters, with this rank's rows in place of those that are split."""
        return [self.rows.get(param, param) for param in params]

    def local_rows(self, param: Tensor, tensor: Tensor) -> Tensor:
        """Return of a tensor the rows that this rank has of a parameter: all, unless it is split."""
        pieces = self.placements[param]
        mine = [piece for piece in pieces if piece.rank == self.rank]
        return rows_of(tensor, mine[0]) if len(pieces) > 1 and mine else tensor

    def local_state(self, param: Tensor, state: Any) -> Any:
        """Return a state with this rank's rows of whatever has as many rows as the parameter."""
        if param not in self.rows:
            return state
        return map_tensors(
            state,
            lambda value: self.local_rows(param, value).clone() if value.shape[:1] == param.shape[:1] else value,
        )

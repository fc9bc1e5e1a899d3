"""The part of an optimizer's parameters that this rank updates."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, distributed, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.strategies.zero.communication import map_tensors
from lightning_lm.strategies.zero.partition import Placed, Placement, place, rows_of

__all__ = ["Ownership"]


class Ownership:
    """Partition of parameters over ranks, and the shard of this one.

    Args:
        min_split_elements: Size from which a parameter is split by rows, where its optimizer allows it.
        group: Ranks over which parameters are partitioned; by default all.
        beside: Ownership of another optimizer that may share parameters: those keep their ranks, and new ones go to
            the ranks that have the fewest elements of both.

    Raises:
        ConfigurationError: If this rank is not in the group.

    Attributes:
        placements: Pieces of each parameter.
        rows: This rank's rows of each parameter that is split, as parameters of their own in the same memory.
    """

    def __init__(
        self,
        min_split_elements: int,
        group: distributed.ProcessGroup | None = None,
        beside: "Ownership | None" = None,
    ) -> None:
        self._min_split_elements, self.group = min_split_elements, group
        initialized = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank(group) if initialized else 0
        self.num_ranks = distributed.get_world_size(group) if initialized else 1
        if self.num_ranks < 1:
            raise ConfigurationError(
                "process_group does not contain this rank. Give each rank the group that it belongs to: "
                "torch.distributed.new_subgroups_by_enumeration makes all of them."
            )
        self._load: list[int] = [0] * self.num_ranks if beside is None else beside._load
        self._known: dict[Tensor, tuple[Placement, nn.Parameter | None]] = {} if beside is None else beside._known
        self.placements: dict[Tensor, Placement] = {}
        self.rows: dict[Tensor, nn.Parameter] = {}

    def take_in(self, params: Sequence[Tensor], splits: Sequence[bool]) -> None:
        """Assign more parameters to ranks; those that are assigned keep their rank.

        Args:
            params: Parameters, in the same order on every rank.
            splits: True for each parameter whose rows may be updated independently.
        """
        pairs = {param: may for param, may in zip(params, splits, strict=True) if param not in self.placements}
        new = [param for param, may in pairs.items() if not self._fits(param, may)]
        placed = [Placed(tuple(param.shape), pairs[param]) for param in new]
        pieces = place(placed, self.num_ranks, load=self._load, min_split_elements=self._min_split_elements)
        for param, placement in zip(new, pieces, strict=True):
            self._known[param] = placement, self._rows_of(param, placement)
        for param in pairs:
            self.placements[param], rows = self._known[param]
            if rows is not None:
                self.rows[param] = rows

    def _fits(self, param: Tensor, may_split: bool) -> bool:
        """Return whether the other optimizer's placement of a parameter fits."""
        return param in self._known and (may_split or len(self._known[param][0]) == 1)

    def _rows_of(self, param: Tensor, placement: Placement) -> nn.Parameter | None:
        mine = [piece for piece in placement if piece.rank == self.rank]
        return nn.Parameter(rows_of(param.detach(), mine[0])) if len(placement) > 1 and mine else None

    def local(self, param: Tensor) -> Tensor | None:
        """Return this rank's shard of a parameter: the whole, rows as a parameter of their own, or ``None``."""
        pieces = self.placements[param]
        if len(pieces) == 1:
            return param if pieces[0].rank == self.rank else None
        return self.rows.get(param)

    def locals(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's shards of several parameters."""
        return [part for param in params if (part := self.local(param)) is not None]

    def with_rows(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return parameters, split ones replaced by this rank's rows."""
        return [self.rows.get(param, param) for param in params]

    def local_rows(self, param: Tensor, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor that belong to this rank's shard of a parameter."""
        pieces = self.placements[param]
        mine = [piece for piece in pieces if piece.rank == self.rank]
        return rows_of(tensor, mine[0]) if len(pieces) > 1 and mine else tensor

    def local_state(self, param: Tensor, state: Any) -> Any:
        """Return optimizer state cut to this rank's rows, for tensors with as many rows as the parameter."""
        if param not in self.rows:
            return state
        return map_tensors(
            state,
            lambda value: self.local_rows(param, value).clone() if value.shape[:1] == param.shape[:1] else value,
        )

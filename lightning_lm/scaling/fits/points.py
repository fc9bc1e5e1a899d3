"""Finished runs as columns of numbers: what every fit is made from."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_lm.errors import DataError

__all__ = ["FLOPS_PER_PARAMETER_TOKEN", "Curve", "FloatArray", "Points"]

FloatArray = NDArray[np.float64]

FLOPS_PER_PARAMETER_TOKEN = 6.0
"""A multiplication and an addition, forward once and backward twice. Kaplan et al. 2020, arXiv:2001.08361, table 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """The end points of runs, sorted, so that no result depends on the order in which they were given.

    Args:
        parameters: Size of the model, in the convention of your choice; see `lightning_lm.scaling.CONVENTIONS`.
        tokens: Tokens it was trained on, repeated ones included.
        loss: Nats per token.
        unique_tokens: Tokens that are different from each other; ``None`` where every token was seen once.
        weight: Weight of each point; ``None`` for equal weights. Only ratios matter.

    Raises:
        DataError: If the columns differ in length, or hold what is not finite and positive.
    """

    parameters: FloatArray
    tokens: FloatArray
    loss: FloatArray
    unique_tokens: FloatArray | None = None
    weight: FloatArray | None = None

    def __post_init__(self) -> None:
        columns = {name: _column(name, value) for name, value in vars(self).items() if value is not None}
        lengths = {name: len(value) for name, value in columns.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"The columns have different lengths, {lengths}; give one value of each for every run.")
        order = np.lexsort([columns[name] for name in reversed(columns)])
        for name, value in columns.items():
            object.__setattr__(self, name, value[order])

    def __len__(self) -> int:
        return len(self.loss)

    @classmethod
    def of(cls, parameters: ArrayLike, tokens: ArrayLike, loss: ArrayLike, **more: Any) -> Self:
        """Return points of any sequences of numbers.

        Args:
            parameters: Size of each model.
            tokens: Tokens of each run.
            loss: Nats per token.
            more: The other columns.
        """
        columns = {"parameters": parameters, "tokens": tokens, "loss": loss, **more}
        return cls(**{name: value for name, value in columns.items() if value is not None})

    @property
    def flops(self) -> FloatArray:
        """Training FLOPs, ``6 * parameters * tokens``."""
        return FLOPS_PER_PARAMETER_TOKEN * self.parameters * self.tokens

    @property
    def weights(self) -> FloatArray:
        """The weights, ones where none were given."""
        return np.ones(len(self)) if self.weight is None else self.weight

    def where(self, chosen: NDArray[Any]) -> Self:
        """Return some of the points.

        Args:
            chosen: A mask, or row numbers.
        """
        columns: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        chosen_rows: dict[str, Any] = {name: None if v is None else v[chosen] for name, v in columns.items()}
        return type(self)(**chosen_rows)

    def by_budget(self, tolerance: float = 0.1) -> list[NDArray[np.intp]]:
        """Return the row numbers of each compute budget, the smallest first.

        Args:
            tolerance: Neighbours in FLOPs that differ by less, as a share, have the same budget.
        """
        order = np.argsort(self.flops, kind="stable")
        gaps = np.diff(np.log(self.flops[order])) > np.log1p(tolerance)
        return [np.sort(rows) for rows in np.split(order, np.flatnonzero(gaps) + 1)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Loss curve of one run.

    Args:
        parameters: Size of the model.
        tokens: Tokens seen at each measurement, increasing.
        loss: Nats per token.
        name: Name in figures.
    """

    parameters: float
    tokens: FloatArray
    loss: FloatArray
    name: str = ""

    def __post_init__(self) -> None:
        tokens, loss = _column("tokens", self.tokens), _column("loss", self.loss)
        if len(tokens) != len(loss) or np.any(np.diff(tokens) <= 0):
            raise DataError("A curve needs one loss for each number of tokens, and rising numbers of tokens.")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "loss", loss)


def _column(name: str, value: ArrayLike | Sequence[float]) -> FloatArray:
    column = np.atleast_1d(np.asarray(value, dtype=np.float64))
    bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
    if column.ndim != 1 or len(bad):
        where = f"row {bad[0]} holds {column[bad[0]]}" if len(bad) else f"its shape is {column.shape}"
        raise DataError(f"The column {name} must hold finite positive numbers, but {where}. Leave that run out.")
    return column

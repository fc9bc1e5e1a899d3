"""Runs with their scores on one task: compute, cost of the right answers, accuracy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import DataError
from lightning_lm.scaling.fits.points import FloatArray

__all__ = ["TaskRuns"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TaskRuns:
    """Runs with their scores on one task, the smallest budget first.

    Args:
        flops: FLOPs of training, [runs].
        cost: Cost of the right answers, [runs]. Bits per byte, or nats.
        accuracy: Accuracy, [runs]. From 0 to 1.
        num_items: Items of the task, [runs].
        chance: Accuracy of random answers.
        ceiling: Accuracy of a perfect model.
        names: Name of each run.
        metric: Name of the accuracy.
        cost_name: Name of the cost.

    Raises:
        DataError: If columns differ in length or have impossible values.
    """

    flops: FloatArray
    cost: FloatArray
    accuracy: FloatArray
    num_items: FloatArray
    chance: float = 0.0
    ceiling: float = 1.0
    names: Sequence[str] = ()
    metric: str = "accuracy"
    cost_name: str = "cost"

    def __post_init__(self) -> None:
        columns = ("flops", "cost", "accuracy", "num_items")
        arrays = {name: np.asarray(getattr(self, name), dtype=np.float64) for name in columns}
        if len({len(column) for column in arrays.values()}) != 1:
            raise DataError(f"The columns {', '.join(columns)} need one value for each run.")
        if not 0 <= self.chance < self.ceiling <= 1:
            raise DataError(f"chance={self.chance:g} must be at least 0 and below ceiling={self.ceiling:g}, at most 1.")
        for name in ("flops", "cost", "num_items"):
            bad = np.flatnonzero(~(np.isfinite(arrays[name]) & (arrays[name] > 0)))
            if len(bad):
                raise DataError(
                    f"{name} of run {self._named(int(bad[0]))} is {arrays[name][bad[0]]}; it must be positive."
                )
        bad = np.flatnonzero(~((arrays["accuracy"] >= 0) & (arrays["accuracy"] <= 1)))
        if len(bad):
            value = arrays["accuracy"][bad[0]]
            raise DataError(f"The accuracy of run {self._named(int(bad[0]))} is {value}; it must lie from 0 to 1.")
        order = np.argsort(arrays["flops"], kind="stable")
        names = [self._named(index) for index in range(len(order))]
        object.__setattr__(self, "names", tuple(names[index] for index in order))
        for name, column in arrays.items():
            object.__setattr__(self, name, column[order])

    def __len__(self) -> int:
        return len(self.flops)

    @property
    def standard_errors(self) -> FloatArray:
        """Standard error of each accuracy, as of independent items; that of one right answer more where all agree."""
        p = (self.accuracy * self.num_items + 0.5) / (self.num_items + 1)
        return np.asarray(np.sqrt(p * (1 - p) / self.num_items))

    def where(self, chosen: NDArray[Any]) -> "TaskRuns":
        """Return some of the runs.

        Args:
            chosen: A mask, or row numbers.
        """
        columns = {name: getattr(self, name)[chosen] for name in ("flops", "cost", "accuracy", "num_items")}
        return dataclasses.replace(self, names=tuple(np.array(self.names, dtype=object)[chosen]), **columns)

    def _named(self, index: int) -> str:
        return self.names[index] if len(self.names) > index and self.names[index] else f"{index + 1}"

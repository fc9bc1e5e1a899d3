"""Search spaces of sweeps: grids, random draws, and sizes around the expected optimum of each compute budget."""

import abc
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Limit, Part

__all__ = ["Grid", "IsoFlopPlan", "RandomSearch", "SearchSpace"]


@dataclass(frozen=True, kw_only=True)
class SearchSpace(Part, abc.ABC):
    """Base of the spaces of settings."""

    @abc.abstractmethod
    def settings(self) -> list[dict[str, Any]]:
        """Return the settings of each run."""


@dataclass(frozen=True, kw_only=True)
class Grid(SearchSpace):
    """Every combination.

    Args:
        values: Candidate values of each setting.

    Example:
        >>> Grid(values={"width": [64, 128], "lr": [0.01]}).settings()
        [{'width': 64, 'lr': 0.01}, {'width': 128, 'lr': 0.01}]
    """

    values: Mapping[str, Sequence[Any]] = field(kw_only=False)

    def settings(self) -> list[dict[str, Any]]:
        """Return the settings of each run, the last one changing fastest."""
        return [dict(zip(self.values, chosen, strict=True)) for chosen in itertools.product(*self.values.values())]


@dataclass(frozen=True, kw_only=True)
class RandomSearch(SearchSpace, limits={"num_runs": Limit.COUNT, "seed": Limit.NON_NEGATIVE}):
    """Independent draws, which cover more values of each setting than a grid of the same number of runs.

    Args:
        num_runs: Number of runs.
        ranges: Lowest and highest value; drawn evenly in the logarithm, so both must be positive.
        choices: Values drawn evenly.
        seed: Seed of the draws.

    Source:
        Bergstra and Bengio 2012, JMLR 13:281-305.
    """

    num_runs: int = field(kw_only=False)
    ranges: Mapping[str, tuple[float, float]] | None = None
    choices: Mapping[str, Sequence[Any]] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (low, high) in (self.ranges or {}).items():
            if not 0 < low < high:
                raise ConfigurationError(f"The range of {name}, {low} to {high}, must be positive and rising.")

    def settings(self) -> list[dict[str, Any]]:
        """Return the settings of each run."""
        random, runs = np.random.default_rng(self.seed), []
        for _ in range(self.num_runs):
            drawn = {name: float(np.exp(random.uniform(*np.log(ends)))) for name, ends in (self.ranges or {}).items()}
            chosen = {
                name: options[int(random.integers(len(options)))] for name, options in (self.choices or {}).items()
            }
            runs.append({**drawn, **chosen})
        return runs


@dataclass(frozen=True, kw_only=True)
class IsoFlopPlan(
    Part,
    limits={"flops": Limit.POSITIVE, "sizes_per_budget": Limit.COUNT, "tokens_per_parameter": Limit.POSITIVE},
):
    """For each budget, the sizes around the one that would be trained on so many tokens a parameter.

    One grid of sizes for all budgets would put minima at its edges and bend the exponent.

    Args:
        flops: The budgets.
        sizes_per_budget: Runs of a budget.
        tokens_per_parameter: Expected optimum of tokens per parameter.
    """

    flops: tuple[float, ...] = field(kw_only=False)
    sizes_per_budget: int = 5
    tokens_per_parameter: float = 20.0

    def choose(self, sizes: Sequence[float], flops: float) -> list[int]:
        """Return which of the sizes to train with a budget, in rising order.

        Args:
            sizes: Parameters of each, in the convention in which budgets are counted.
            flops: The budget.
        """
        wanted = math.sqrt(flops / 6 / self.tokens_per_parameter)
        order = sorted(range(len(sizes)), key=lambda index: abs(math.log(sizes[index] / wanted)))
        return sorted(order[: self.sizes_per_budget], key=lambda index: sizes[index])

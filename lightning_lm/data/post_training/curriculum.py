"""A curriculum: levels of examples, from easy to hard, and the rule that moves between them by the success rate."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from lightning_lm.data.post_training.examples import ExampleSource, Record
from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Limit

__all__ = ["Curriculum", "LevelState"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelState:
    """Position in a curriculum.

    Args:
        level: Index of the level.
        right: Completions that were right since it was last decided on.
        count: All completions since then.
    """

    level: int = 0
    right: int = 0
    count: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum(
    ExampleSource,
    limits={"raise_at": Limit.FRACTION, "lower_at": Limit.FRACTION, "window": Limit.COUNT, "start": Limit.NON_NEGATIVE},
):
    """Prompts whose difficulty follows the success rate of the policy, for `PromptDataModule`.

    After every ``window`` completions of a level the next level is taken if enough of them were right, and the level
    before if too few were. A completion is right as for ``val/pass@1``: by the first reward, at least
    ``plan.validation.threshold``. Logged as ``train/curriculum/level`` and ``train/curriculum/success``. Read
    as plain records, as for validation, it has those of all levels.

    Args:
        levels: Sources of the examples, from easy to hard, such as `ReasoningGym` with ``level`` 0, 1 and 2.
        raise_at: Success rate from which the next level is taken.
        lower_at: Success rate below which the level before is taken; 0 never goes back.
        window: Completions after which it is decided. A rollout is never divided between levels.
        start: Index of the first level.

    Raises:
        ConfigurationError: If there is no level, ``start`` is none of them, or ``lower_at`` is not below ``raise_at``.
    """

    levels: tuple[ExampleSource, ...] = dataclasses.field(kw_only=False)
    raise_at: float = 0.75
    lower_at: float = 0.2
    window: int = 128
    start: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start < len(self.levels):
            raise ConfigurationError(
                f"start={self.start} must be the index of one of the {len(self.levels)} levels; give at least one."
            )
        if self.lower_at >= self.raise_at:
            raise ConfigurationError(f"lower_at={self.lower_at} must be below raise_at={self.raise_at}.")

    def records(self) -> Iterator[Record]:
        """Yield the records of one level after the other."""
        for source in self.levels:
            yield from source.records()

    def split(self, side: Literal["train", "validation"], fraction: float) -> ExampleSource:
        """Return one side of every level.

        Args:
            side: ``"train"`` or ``"validation"``.
            fraction: Fraction of each level's records for validation.
        """
        return dataclasses.replace(self, levels=tuple(source.split(side, fraction) for source in self.levels))

    def advance(self, state: LevelState, right: int, count: int) -> LevelState:
        """Return the position after a rollout.

        Args:
            state: Position before it.
            right: Completions of the rollout that were right, over all ranks.
            count: All its completions, over all ranks.
        """
        right, count = state.right + right, state.count + count
        if count < self.window:
            return LevelState(level=state.level, right=right, count=count)
        success = right / count
        change = 1 if success >= self.raise_at else -1 if success < self.lower_at else 0
        return LevelState(level=min(max(state.level + change, 0), len(self.levels) - 1))

"""Examples with answers that stand before each question."""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

from lightning_lm.errors import DataError
from lightning_lm.parts import Limit, Part

__all__ = ["FirstShots", "RandomShots", "Shots"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shots(Part, limits={"num": Limit.NON_NEGATIVE}):
    """Base of the ways to choose the examples before a question.

    Args:
        num: Number of examples.
        split: Split that they come from; the item itself is never among them.
        same_subject: Take those of the item's subject only.
    """

    num: int = 0
    split: str = "train"
    same_subject: bool = False

    def ordered(self, pool: Sequence[Any], subject: str) -> Sequence[Any]:
        """Return the records in the order in which they are preferred.

        Args:
            pool: Records of the split, of the subject if that is asked for.
            subject: Subject of the items.
        """
        raise NotImplementedError

    def choose(self, ordered: Sequence[Any], item: Any, subject: str) -> list[Any]:
        """Return the examples of an item. Items of a subject have the same, so that a prefix cache can be used.

        Args:
            ordered: Records in the order of preference.
            item: The item's own record.
            subject: Subject of the item.

        Raises:
            DataError: If there are too few.
        """
        chosen = list(itertools.islice((record for record in ordered if record != item), self.num))
        if len(chosen) < self.num:
            of_subject = f" with the subject {subject!r}" if self.same_subject else ""
            raise DataError(
                f"{self.num} examples are wanted before each question, and the split {self.split!r} has "
                f"{len(chosen)}{of_subject} besides the question itself. Use fewer: shots={len(chosen)}."
            )
        return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstShots(Shots):
    """The first records of a split."""

    def ordered(self, pool: Sequence[Any], subject: str) -> Sequence[Any]:  # noqa: ARG002
        """Return the records as they are."""
        return pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomShots(Shots):
    """Records drawn by a seed.

    Args:
        seed: Seed of the draw.
    """

    seed: int = 1234

    def ordered(self, pool: Sequence[Any], subject: str) -> Sequence[Any]:
        """Return the records in a random order."""
        return random.Random(f"{self.seed}:{subject}").sample(pool, len(pool))

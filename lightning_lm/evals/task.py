"""A task: where its items come from, what is asked of the model for each, and how the answers are scored."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from lightning_lm.evals.requests import Completions, LogLikelihood, Request
from lightning_lm.parts import Part

__all__ = ["Answer", "Item", "Task"]

Answer = LogLikelihood | Completions


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a task.

    Args:
        id: Name in the results, unique in the task; it stays when other items come or go.
        requests: What the model is asked.
        gold: What the score needs to know: index or indices of the right choice, the reference answer, tests.
        subject: Part of the task whose score is shown by itself; empty if there are none.
        cluster: What it shares with other items (a passage), for standard errors; ``None`` if nothing.
    """

    id: str
    requests: tuple[Request, ...]
    gold: object
    subject: str = ""
    cluster: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Part, abc.ABC):
    """Base of the evaluation tasks that YAML and the command line can name."""

    main_metric: ClassVar[str] = "acc"
    """Name of the metric that stands for the task where one number is shown."""
    chance: ClassVar[float] = 0.0
    """Value of the main metric for random answers."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name in results and logs."""

    @abc.abstractmethod
    def items(self) -> Sequence[Item]:
        """Return the items, in an order that does not change.

        Raises:
            DataError: If the data are missing, or a record does not fit; names file, place and field.
        """

    @abc.abstractmethod
    def score(self, item: Item, answers: Sequence[Answer]) -> Mapping[str, float]:
        """Return the metrics of an item; the task's are their means over items.

        Args:
            item: The question.
            answers: Answer to each of its requests.
        """

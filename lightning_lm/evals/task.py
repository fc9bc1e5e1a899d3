"""A task: where its items come from, what is asked of the model for each, and how the answers are scored."""

import abc
import dataclasses
import math
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
        requests: Questions to the model.
        gold: Reference for the score: index or indices of the right choice, the reference answer, tests.
        subject: Part of the task whose score is shown by itself; empty if there are none.
        cluster: Passage or the like that it shares with other items, for standard errors; ``None`` if nothing.
        text: Text by which training data are searched for the item; the question of its first request by default.
    """

    id: str
    requests: tuple[Request, ...]
    gold: object
    subject: str = ""
    cluster: str | None = None
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Part, abc.ABC):
    """Base of the evaluation tasks that YAML and the command line can name.

    Args:
        name: Name in results and logs.
    """

    name: str = dataclasses.field(kw_only=False)

    numbers: ClassVar[frozenset[str]] = frozenset({"gold_bits_per_byte", "gold_logprob", "logprob", "tokens"})
    """Metrics of an item that are no fractions of a right answer, even where they lie between 0 and 1."""

    @property
    def main_metric(self) -> str:
        """Name of the metric that stands for the task where one number is shown."""
        return "acc"

    @property
    def chance(self) -> float:
        """Value of the main metric for random answers."""
        return 0.0

    @abc.abstractmethod
    def items(self) -> Sequence[Item]:
        """Return the items, in an order that does not change.

        Raises:
            DataError: If the data are missing, or a record does not fit; names file, place and field.
        """

    @abc.abstractmethod
    def score(self, item: Item, answers: Sequence[Answer]) -> Mapping[str, float]:
        """Return the metrics of an item, or the sums that `aggregate` needs of it.

        Args:
            item: The question.
            answers: Answer to each of its requests.
        """

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the metrics of the task: by default, the mean of each metric over the items that have it.

        Args:
            scores: Result of `score` for each item, of all items or of some.
        """
        values: dict[str, list[float]] = {}
        for metrics in scores:
            for metric, value in metrics.items():
                values.setdefault(metric, []).append(value)
        return {metric: math.fsum(each) / len(each) for metric, each in values.items()}

"""Multiple-choice questions, answered by the likelihood of each choice."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lm.errors import DataError
from lightning_lm.evals.requests import Likelihood, LogLikelihood, Prompt
from lightning_lm.evals.task import Answer, Item
from lightning_lm.evals.tasks.record_task import Fields, RecordTask
from lightning_lm.evals.tasks.template import evaluate_expression

__all__ = ["ChoiceTask", "best_choices", "score_choices"]

_TIE = 1e-6
"""Relative difference of two log-likelihoods that are equal but for the rounding of float32 sums."""


def best_choices(scores: Sequence[float]) -> list[int]:
    """Return the indices of the largest scores: several if they are equal but for rounding.

    Args:
        scores: Score of each choice.
    """
    largest = max(scores)
    return [index for index, score in enumerate(scores) if math.isclose(score, largest, rel_tol=_TIE, abs_tol=1e-12)]


def score_choices(
    logprobs: Sequence[float], choices: Sequence[str], gold: Sequence[int], *, normalised: bool = True
) -> dict[str, float]:
    """Return the metrics of one multiple-choice question.

    * ``acc``: is the likeliest choice right? Choices that are equally likely share the point, so that a model without
      an opinion scores chance, not the fraction of questions whose first choice is right.
    * ``acc_norm``, ``acc_bytes``: the same after division by the characters or UTF-8 bytes of the choices.
    * ``gold_logprob``: log-likelihood of the right choice, nats, and ``gold_bits_per_byte``: its cost. These fall
      smoothly with scale while accuracy jumps.

    Args:
        logprobs: Log-likelihood of each choice. Nats.
        choices: Texts of the choices, without what parts them from the question.
        gold: Indices of the right choices.
        normalised: Give ``acc_norm`` and ``acc_bytes``.

    Example:
        >>> score_choices([-1.0, -1.0, -2.0, -3.0], ["A", "B", "C", "D"], [0], normalised=False)["acc"]
        0.5
    """
    characters = [len(choice) for choice in choices]
    num_bytes = [len(choice.encode("utf-8", "surrogatepass")) for choice in choices]
    metrics = {"acc": _share(logprobs, gold)}
    if normalised:
        metrics["acc_norm"] = _share([logprob / n for logprob, n in zip(logprobs, characters, strict=True)], gold)
        metrics["acc_bytes"] = _share([logprob / n for logprob, n in zip(logprobs, num_bytes, strict=True)], gold)
    best = max(gold, key=lambda index: logprobs[index])
    metrics["gold_logprob"] = logprobs[best]
    metrics["gold_bits_per_byte"] = -logprobs[best] / math.log(2) / num_bytes[best]
    return metrics


def _share(scores: Sequence[float], gold: Sequence[int]) -> float:
    best = best_choices(scores)
    return sum(index in gold for index in best) / len(best)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceTask(RecordTask):
    """Multiple-choice questions: the choice is that of the largest likelihood after the question.

    Metrics are those of `score_choices`.

    Args:
        choices: Expression of the list of choices.
        gold: Expression of the index of the right choice, or of a list of indices.
        metric: Metric that stands for the task.
    """

    choices: str = "choices"
    gold: str = "answer"
    metric: str = "acc"

    @property
    def main_metric(self) -> str:
        """Name of the metric that stands for the task."""
        return self.metric

    @property
    def chance(self) -> float:
        """Mean over the items of the fraction of choices that are right."""
        return self._chance

    @functools.cached_property
    def _chance(self) -> float:
        items = self.items()
        return math.fsum(len(_indices(item.gold)) / len(item.requests) for item in items) / len(items)

    def item(self, fields: Fields, prompt: Prompt) -> Item:
        """Return the item of a record: one request for each choice."""
        choices, gold = self.choices_of(fields), self.gold_of(fields)
        requests = tuple(Likelihood(prompt, self.delimiter + choice) for choice in choices)
        return Item(id="", requests=requests, gold=gold[0] if len(gold) == 1 else gold)

    def searched_text(self, fields: Fields) -> str:
        """Return the values in the question, and the right choice."""
        return f"{super().searched_text(fields)} {self.shot_answer(fields)}"

    def shot_answer(self, fields: Fields) -> str:
        """Return the right choice."""
        return self.choices_of(fields)[self.gold_of(fields)[0]]

    def choices_of(self, fields: Fields) -> list[str]:
        """Return the choices of a record.

        Args:
            fields: Fields of the record.

        Raises:
            DataError: If these are fewer than two texts.
        """
        choices = evaluate_expression(self.choices, fields, "choices")
        if not isinstance(choices, list | tuple) or len(choices) < 2:
            raise DataError(f"choices={self.choices!r} must give a list of at least two texts, got {choices!r:.80}.")
        empty = [index for index, choice in enumerate(choices) if not str(choice)]
        if empty:
            raise DataError(f"choice {empty[0]} is empty; repair the record or remove it.")
        return [str(choice) for choice in choices]

    def gold_of(self, fields: Fields) -> tuple[int, ...]:
        """Return the indices of the right choices of a record.

        Args:
            fields: Fields of the record.

        Raises:
            DataError: If an index is none of a choice.
        """
        number = len(self.choices_of(fields))
        gold = evaluate_expression(self.gold, fields, "gold")
        values = list(gold) if isinstance(gold, list | tuple) else [gold]
        try:
            indices = tuple(int(value) for value in values)
        except (TypeError, ValueError):
            indices = ()
        if not indices or not all(0 <= index < number for index in indices):
            raise DataError(
                f"gold={self.gold!r} must give the index of the right choice, 0 to {number - 1}, got {gold!r:.80}."
                " The test splits of some tasks come without answers: use split=validation."
            )
        return indices

    def score(self, item: Item, answers: Sequence[Answer]) -> Mapping[str, float]:
        """Return the metrics of an item."""
        texts = [request.continuation for request in item.requests if isinstance(request, Likelihood)]
        logprobs = [answer.logprob for answer in answers if isinstance(answer, LogLikelihood)]
        choices = [text.removeprefix(self.delimiter) for text in texts]
        return score_choices(logprobs, choices, _indices(item.gold))


def _indices(gold: Any) -> tuple[int, ...]:
    return tuple(gold) if isinstance(gold, list | tuple) else (gold,)

"""Texts whose end is to be predicted, word for word: the form of LAMBADA."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lightning_lm.errors import DataError
from lightning_lm.evals.requests import Likelihood, LogLikelihood, Prompt
from lightning_lm.evals.task import Answer, Item
from lightning_lm.evals.tasks.perplexity_task import perplexity
from lightning_lm.evals.tasks.record_task import Fields, RecordTask
from lightning_lm.evals.tasks.template import render_record

__all__ = ["ContinuationTask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuationTask(RecordTask):
    """Texts whose end is to be predicted.

    ``acc`` is the fraction of ends that greedy decoding gives, ``perplexity`` that of the whole end, ``logprob`` its
    mean log-likelihood (nats).

    Args:
        target: Template of the end, without the delimiter.
    """

    target: str = "{{ target }}"

    def item(self, fields: Fields, prompt: Prompt) -> Item:
        """Return the item of a text."""
        target = self.shot_answer(fields)
        request = Likelihood(prompt, self.delimiter + target)
        return Item(id="", requests=(request,), gold=target)

    def searched_text(self, fields: Fields) -> str:
        """Return the values in the question, and the end."""
        return f"{super().searched_text(fields)} {self.shot_answer(fields)}"

    def shot_answer(self, fields: Fields) -> str:
        """Return the end.

        Raises:
            DataError: If it is empty.
        """
        target = render_record(self.target, fields, "target")
        if not target.strip():
            raise DataError(f"target={self.target!r} is empty: there is nothing to predict.")
        return target

    def score(self, item: Item, answers: Sequence[Answer]) -> Mapping[str, float]:  # noqa: ARG002
        """Return whether the end is the greedy one, and its log-likelihood."""
        (answer,) = answers
        assert isinstance(answer, LogLikelihood)
        return {"acc": float(answer.is_greedy), "logprob": answer.logprob}

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the means, and the perplexity."""
        means = super().aggregate(scores)
        return {**means, "perplexity": perplexity(-means["logprob"])} if math.isfinite(means["logprob"]) else means

"""Perplexity of texts, per word and byte of the original text, so that tokenizers can be compared."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from lightning_lm.errors import DataError
from lightning_lm.evals.requests import LogLikelihood, Prompt, RollingLikelihood
from lightning_lm.evals.task import Answer, Item
from lightning_lm.evals.tasks.record_task import Fields, RecordTask
from lightning_lm.evals.tasks.template import render_record

__all__ = ["PerplexityTask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityTask(RecordTask):
    """Perplexity of whole texts: ``word_perplexity``, ``byte_perplexity`` and ``bits_per_byte``.

    These are ratios of sums over all items. Words and bytes are counted in ``original``, whatever the model reads.

    Args:
        question: Template of the text that is scored.
        original: Template of the text whose words and bytes are counted; by default the scored one.
    """

    question: str = "{{ text }}"
    original: str = ""

    @property
    def main_metric(self) -> str:
        """Bits per byte."""
        return "bits_per_byte"

    @property
    def chance(self) -> float:
        """Bits per byte of a model that finds every byte equally likely."""
        return 8.0

    def item(self, fields: Fields, prompt: Prompt) -> Item:
        """Return the item of a text."""
        original = render_record(self.original, fields, "original") if self.original else prompt.question
        if not original.strip():
            raise DataError("the text is empty; remove the record.")
        counts = (len(re.split(r"\s+", original)), len(original.encode("utf-8", "surrogatepass")))
        return Item(id="", requests=(RollingLikelihood(prompt.question),), gold=counts)

    def shot_answer(self, fields: Fields) -> str:  # noqa: ARG002
        """Refuse examples: a text is scored by itself.

        Raises:
            DataError: Always.
        """
        raise DataError("a perplexity is measured without examples; use shots=0.")

    def score(self, item: Item, answers: Sequence[Answer]) -> Mapping[str, float]:
        """Return log-likelihood (nats), words and bytes of a text."""
        (answer,) = answers
        assert isinstance(answer, LogLikelihood)
        assert isinstance(item.gold, tuple)
        words, num_bytes = item.gold
        return {"logprob": answer.logprob, "words": float(words), "bytes": float(num_bytes)}

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the perplexities of all texts together."""
        nats = -math.fsum(score["logprob"] for score in scores)
        words, num_bytes = (math.fsum(score[name] for score in scores) for name in ("words", "bytes"))
        return {
            "bits_per_byte": nats / num_bytes / math.log(2),
            "byte_perplexity": perplexity(nats / num_bytes),
            "word_perplexity": perplexity(nats / words),
        }


def perplexity(nats: float) -> float:
    """Return the exponential of a mean, infinite beyond the float range.

    Args:
        nats: Mean negative log-likelihood.
    """
    return math.exp(nats) if nats < 709 else math.inf

"""Documents scored by a trained classifier, and kept from a score on or with a probability that grows with it.

torch is imported when a classifier is loaded: the other steps, and their worker processes, run without it.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lm.curation.decisions import uniform_of_ids
from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.ngram_features import ngram_batch, ngram_features
from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.parts import Limit, Part

if TYPE_CHECKING:
    from lightning_lm.models import NgramClassifier

__all__ = ["Classify", "KeepAbove", "ParetoKeep", "ScoreRule", "TextClassifier"]


class TextClassifier:
    """A classifier of texts with its class names and temperature.

    Args:
        model: The classifier.
        labels: Names of its classes.
        temperature: Temperature of the probabilities.

    Attributes:
        labels: As given.
    """

    def __init__(self, model: "NgramClassifier", labels: tuple[str, ...], temperature: float = 1.0) -> None:
        self._model, self.labels, self._temperature = model.eval(), labels, temperature

    def probabilities(self, text: str) -> dict[str, float]:
        """Return the probability of each class.

        Args:
            text: Text of a document.
        """
        import torch

        batch = ngram_batch([ngram_features(text, self._model.max_ngram)])
        with torch.no_grad():
            logits = self._model(**batch)[0].double() / self._temperature
        return dict(zip(self.labels, logits.softmax(-1).tolist(), strict=True))

    @classmethod
    def load(cls, checkpoint: str | Path) -> "TextClassifier":
        """Read a classifier that `ClassificationModule` trained, or one of fastText.

        Args:
            checkpoint: A ``.ckpt`` of the Trainer, or a ``.bin`` of fastText.

        Raises:
            CheckpointError: If there is no such file, or it has no classifier of n-grams.
        """
        path = Path(checkpoint)
        if not path.is_file():
            raise CheckpointError(f"There is no classifier at {path}. Train one with curation/quality_classifier.")
        if path.suffix in (".bin", ".ftz"):
            from lightning_lm.curation.fasttext_model import FastTextClassifier

            return FastTextClassifier(path)
        import torch

        from lightning_lm.models.ngram_classifier import CLASSIFIER_ENTRY, NgramClassifier

        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        entry = content.get(CLASSIFIER_ENTRY)
        if entry is None:
            raise CheckpointError(f"{path} has no classifier of n-grams; ClassificationModule writes one.")
        model = NgramClassifier(**entry["settings"])
        prefix = "model."
        weights = {name: value for name, value in content["state_dict"].items() if name.startswith(prefix)}
        model.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items()})
        return cls(model, tuple(entry["labels"]), entry["temperature"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreRule(Part):
    """Base of the rules that decide by a probability."""

    def limit(self, document_id: str) -> float:
        """Return the smallest probability with which a document is kept.

        Args:
            document_id: Id of the document, from which a random rule takes its random number.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepAbove(ScoreRule, limits={"minimum": Limit.FRACTION}):
    """Keeps documents from a probability on.

    Args:
        minimum: Smallest probability that is kept.
    """

    minimum: float = 0.5

    def limit(self, document_id: str) -> float:  # noqa: ARG002
        """Return the minimum.

        Args:
            document_id: Id of the document.
        """
        return self.minimum


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParetoKeep(ScoreRule, limits={"alpha": Limit.POSITIVE}):
    """Keeps a document if ``1 - probability`` is below a number drawn from a Pareto distribution (GPT-3's rule).

    Most documents with a high probability are kept, and some with a low one, so that the corpus stays varied. The
    number follows from the document's id and the seed, not from its place.

    Args:
        alpha: Shape of the distribution; larger keeps fewer.
        seed: Seed of the numbers.

    Source:
        Brown et al. 2020, arXiv:2005.14165, appendix A: ``np.random.pareto(alpha) > 1 - document_score``.
    """

    alpha: float = 9.0
    seed: int = 0

    def limit(self, document_id: str) -> float:
        """Return one minus the number drawn; below 0 everything is kept.

        Args:
            document_id: Id of the document.
        """
        uniform = float(uniform_of_ids([document_id], self.seed)[0])
        return 1 - (math.pow(1 - uniform, -1 / self.alpha) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(Part):
    """Scores documents with a classifier, writes the probability into the metadata, and keeps them by a rule.

    Args:
        checkpoint: A ``.ckpt`` that `ClassificationModule` trained, or a ``.bin`` of fastText.
        label: Class whose probability counts.
        keep: Rule that decides by the probability; ``None`` keeps all.
        field: Name of the metadata field with the probability.
    """

    checkpoint: str = dataclasses.field(kw_only=False)
    label: str = "good"
    keep: ScoreRule | None = KeepAbove()
    field: str = "quality_score"

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document with its score, or its removal.

        Args:
            document: The document.

        Raises:
            ConfigurationError: If the classifier has no class of that name.
        """
        classifier = _classifier(self.checkpoint)
        if self.label not in classifier.labels:
            raise ConfigurationError(f"label={self.label!r} must be one of {', '.join(classifier.labels)}.")
        score = classifier.probabilities(document.text)[self.label]
        limit = 0.0 if self.keep is None else self.keep.limit(document.id)
        if score < limit:
            return Removed(document, self.field, score, limit)
        return dataclasses.replace(document, metadata={**document.metadata, self.field: round(score, 4)})


@functools.lru_cache(maxsize=4)
def _classifier(checkpoint: str) -> TextClassifier:
    return TextClassifier.load(checkpoint)

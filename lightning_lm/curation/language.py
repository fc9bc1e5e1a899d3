"""Language of a text by the model of py3langid (Lui and Baldwin 2012), which comes with the package.

The model is naive Bayes on byte n-grams, which an automaton finds: its state after each byte stands for the longest
n-gram, of a few bytes at most, that ends there. So the states after all bytes of a text are found at once, each by that
many transitions from the first state, where py3langid walks from byte to byte. Labels are the same, probabilities equal
up to rounding.
"""

import dataclasses
import functools
import math
import unicodedata

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.document import Document, Removed
from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.parts import Limit, Part

__all__ = ["Language", "identify_language"]


def identify_language(text: str, *, max_characters: int = 4000) -> tuple[str, float]:
    """Return the language of a text (ISO 639-1) and its probability; ``und`` and 0 for a text without letters.

    Args:
        text: Text of a document.
        max_characters: Characters that are looked at, from the middle of a longer text.

    Raises:
        MissingDependencyError: If ``py3langid`` is not installed.
    """
    start = max(len(text) - max_characters, 0) // 2
    text = text[start : start + max_characters]
    if not any(map(str.isalpha, text)):
        return "und", 0.0
    text = unicodedata.normalize("NFC", text.lower() if text.isupper() else text)
    probabilities = _model().probabilities(text.encode("utf-8", "replace"))
    best = int(probabilities.argmax())
    return _model().labels[best], float(probabilities[best])


@dataclasses.dataclass(frozen=True, slots=True)
class _Model:
    """Naive Bayes on byte n-grams.

    Args:
        transitions: Next state by row of the state and byte.
        rows: Beginning of the row of each state, int64 [states].
        features: N-gram that ends in each state, -1 for none.
        depth: Bytes of the longest n-gram.
        log_likelihoods: float32 [n-grams, classes].
        log_priors: float32 [classes].
        labels: Languages; one may have several classes, for its scripts.
        label_of_class: Index of the language of each class.
    """

    transitions: NDArray[np.uint32]
    rows: NDArray[np.int64]
    features: NDArray[np.int32]
    depth: int
    log_likelihoods: NDArray[np.float32]
    log_priors: NDArray[np.float32]
    labels: list[str]
    label_of_class: NDArray[np.int64]

    def probabilities(self, text: bytes) -> NDArray[np.float64]:
        """Return the probability of each language, at a temperature of the root of the text's length."""
        features = self.features.take(self._states(np.frombuffer(text, np.uint8)))
        found, counts = np.unique(features[features >= 0], return_counts=True)
        scores = np.zeros_like(self.log_priors)
        if len(found):
            scores = np.log1p(counts.astype(np.float32)) @ self.log_likelihoods[found] + self.log_priors
        scores /= np.float32(math.sqrt(len(text)))
        weights = np.bincount(self.label_of_class, np.exp(scores - scores.max())).astype(np.float64)
        probabilities: NDArray[np.float64] = weights / weights.sum()
        return probabilities

    def _states(self, codes: NDArray[np.uint8]) -> NDArray[np.uint32]:
        """Return the state after each byte."""
        states = np.zeros(len(codes), np.uint32)
        for distance in reversed(range(min(self.depth, len(codes)))):
            places = self.rows.take(states[distance:]) + codes[: len(codes) - distance]
            states[distance:] = self.transitions.take(places)
        return states


@functools.cache
def _model() -> _Model:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError as error:
        raise MissingDependencyError("py3langid", "identify languages", "curation") from error
    model = LanguageIdentifier.from_model_file(MODEL_FILE)
    transitions = np.frombuffer(model.tk_nextmove, model.tk_nextmove.typecode)
    rows = np.array(model.tk_row, np.int64) << 8
    labels = list(model.labels)
    return _Model(
        transitions=transitions,
        rows=rows,
        features=np.array(model.tk_output, np.int32),
        depth=_depth(transitions, rows),
        log_likelihoods=model.nb_ptc.astype(np.float32),
        log_priors=model.nb_pc,
        labels=labels,
        label_of_class=np.array([labels.index(name) for name in model.nb_classes]),
    )


def _depth(transitions: NDArray[np.uint32], rows: NDArray[np.int64]) -> int:
    """Return the most bytes that lead to a state on the shortest way from the first one. States may share a row."""
    seen, visited = np.zeros(len(rows), bool), np.zeros(len(transitions), bool)
    front, depth = np.array([0]), -1
    while len(front):
        seen[front] = True
        begins = np.unique(rows[front])
        begins = begins[~visited[begins]]
        visited[begins] = True
        after = np.zeros(len(rows), bool)
        after[transitions[begins[:, None] + np.arange(256)]] = True
        front, depth = np.flatnonzero(after & ~seen), depth + 1
    return depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language(Part, limits={"min_score": Limit.FRACTION, "max_characters": Limit.COUNT}):
    """Keeps documents in some languages, and writes the language into the fields ``language`` and ``language_score``.

    Args:
        languages: Codes of languages (ISO 639-1), such as ``en``; none keeps all languages.
        min_score: Smallest probability of the language.
        max_characters: Characters that are looked at, from the middle of a longer document.

    Raises:
        ConfigurationError: If a code is not one of ISO 639-1.
    """

    languages: str | tuple[str, ...] = dataclasses.field(kw_only=False)
    min_score: float = 0.65
    max_characters: int = 4000

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [code for code in self._codes if not (len(code) == 2 and code.isascii() and code.islower())]
        if wrong:
            raise ConfigurationError(
                f"languages={self.languages!r}: {wrong[0]!r} is no code of two lower-case letters, such as 'en'."
            )

    @property
    def _codes(self) -> tuple[str, ...]:
        return (self.languages,) if isinstance(self.languages, str) else tuple(self.languages)

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document with its language, or its removal.

        Args:
            document: The document.
        """
        label, score = identify_language(document.text, max_characters=self.max_characters)
        if self._codes and label not in self._codes:
            return Removed(document, "language", label, ", ".join(self._codes))
        if score < self.min_score:
            return Removed(document, "language_score", score, self.min_score)
        fields = {"language": label, "language_score": round(score, 4)}
        return dataclasses.replace(document, metadata={**document.metadata, **fields})

"""Language of a text by py3langid, whose model comes with the package (Lui and Baldwin 2012)."""

import dataclasses
import functools
from typing import Any

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
    label, probability = _identifier().classify(text.encode("utf-8", "replace").decode())
    return str(label), float(probability)


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError as error:
        raise MissingDependencyError("py3langid", "identify languages", "curation") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


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

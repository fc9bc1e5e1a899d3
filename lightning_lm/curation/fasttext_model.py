"""Published classifiers of fastText (``.bin`` and ``.ftz`` files), read by the ``fasttext`` package."""

import importlib
from pathlib import Path

from lightning_lm.curation.classify import TextClassifier
from lightning_lm.errors import CheckpointError, MissingDependencyError

__all__ = ["FastTextClassifier"]


class FastTextClassifier(TextClassifier):
    """A classifier of fastText; class names are without ``__label__``.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is no model of fastText.
        MissingDependencyError: If ``fasttext`` is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            fasttext = importlib.import_module("fasttext")
        except ModuleNotFoundError as error:
            raise MissingDependencyError("fasttext-numpy2-wheel", "read a model of fastText") from error
        try:
            self._fasttext = fasttext.load_model(str(path))
        except ValueError as error:
            raise CheckpointError(f"{path} is no model of fastText: {error}.") from error
        self.labels = tuple(label.removeprefix("__label__") for label in self._fasttext.get_labels())

    def probabilities(self, text: str) -> dict[str, float]:
        """Return the probability of each class.

        Args:
            text: Text of a document; a line break would end it for fastText.
        """
        # a list of texts: for a single one the package makes an array in a way that numpy 2 refuses
        labels, scores = self._fasttext.predict([" ".join(text.split())], k=-1)
        pairs = zip(labels[0], scores[0], strict=True)
        return {label.removeprefix("__label__"): min(float(score), 1.0) for label, score in pairs}

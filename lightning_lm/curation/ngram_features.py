"""Hashes of the word n-grams of texts, as `lightning_lm.models.NgramClassifier` and importance resampling read them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.shingles import ngram_hashes, word_hashes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ngram_batch", "ngram_features"]


def ngram_features(text: str, max_ngram: int) -> NDArray[np.int64]:
    """Return the hashes of all word n-grams of a text, int64 [ngrams] and not negative.

    Args:
        text: Text of a document.
        max_ngram: Words of the longest n-gram; those of one word up to it are returned.
    """
    words = word_hashes(text)
    parts = [ngram_hashes(words, n) for n in range(1, max_ngram + 1) if n <= len(words)]
    return (np.concatenate([np.zeros(0, np.uint64), *parts]) >> np.uint64(1)).astype(np.int64)


def ngram_batch(features: Sequence[NDArray[np.int64]]) -> dict[str, "Tensor"]:
    """Return the inputs of `NgramClassifier.forward`.

    Args:
        features: Result of `ngram_features` for each text.
    """
    import torch  # only here: importance resampling has no use for it

    lengths = np.array([len(values) for values in features], np.int64)
    return {
        "ngrams": torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *features])),
        "offsets": torch.from_numpy(np.cumsum(lengths) - lengths),
    }

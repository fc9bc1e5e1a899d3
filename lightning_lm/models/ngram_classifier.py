"""A linear classifier of hashed word n-grams, in the manner of fastText (Joulin et al. 2016, arXiv:1607.01759).

The embeddings of a text's n-grams are averaged, and a linear layer makes logits of the mean. N-grams come as hashes and
share buckets, so there is no vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.parts import Limit, check_numbers

__all__ = ["CLASSIFIER_ENTRY", "NgramClassifier"]

CLASSIFIER_ENTRY = "classifier"
"""Key of a checkpoint under which `ClassificationModule` writes how to build the classifier again."""


class NgramClassifier(nn.Module):
    """Mean of hashed n-gram embeddings, and a linear layer.

    Args:
        num_classes: Number of classes.
        buckets: Number of embeddings that all n-grams share.
        d_model: Features of an embedding.
        max_ngram: Words of the longest n-gram; those of one word up to it are used.

    Attributes:
        settings: The arguments, from which the classifier can be built again.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    def __init__(self, num_classes: int = 2, *, buckets: int = 1 << 18, d_model: int = 16, max_ngram: int = 2) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "num_classes": num_classes, "buckets": buckets, "d_model": d_model, "max_ngram": max_ngram
        }  # fmt: skip
        check_numbers(dict.fromkeys(self.settings, Limit.COUNT), self.settings)
        self.embedding = nn.EmbeddingBag(buckets, d_model, mode="mean")
        self.head = nn.Linear(d_model, num_classes)
        nn.init.uniform_(self.embedding.weight, -1 / d_model, 1 / d_model)  # as in fastText
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def max_ngram(self) -> int:
        """Words of the longest n-gram."""
        return int(self.settings["max_ngram"])

    def forward(self, ngrams: Int[Tensor, " ngrams"], offsets: Int[Tensor, " batch"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of texts.

        Args:
            ngrams: Hashes of the n-grams of all texts, one text after the other.
            offsets: Index of each text's first n-gram. A text without any has the logits of the bias.
        """
        mean = self.embedding(torch.remainder(ngrams, self.embedding.num_embeddings), offsets)
        logits: Tensor = self.head(mean)
        return logits

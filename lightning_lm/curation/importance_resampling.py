"""Data selection by importance resampling, DSIR (Xie et al. 2023, arXiv:2302.03169).

Hashed n-grams have a distribution in the target text and one in the corpus. A document's log-importance is the sum of
the log-ratios of its n-grams; with Gumbel noise added, the largest are a sample without replacement in proportion to
the importance. The noise of a document follows from its id.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.decisions import uniform_of_ids
from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.ngram_features import ngram_features
from lightning_lm.curation.step import Arrays
from lightning_lm.data import Source, as_source
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.parts import Limit, Part

__all__ = ["ImportanceResampling"]

_LIMITS = {
    **dict.fromkeys(("fraction", "smoothing"), Limit.POSITIVE),
    **dict.fromkeys(("num_documents", "max_ngram", "buckets"), Limit.COUNT),
    "temperature": Limit.NON_NEGATIVE,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportanceResampling(Part, limits=_LIMITS):
    """Keeps the documents of a corpus that are distributed like a target text.

    Args:
        target: Texts that the selection should be like: a `Source`, or the path of a file or folder.
        fraction: Fraction of the documents to keep, up to 1; set either this or the number.
        num_documents: Number of documents to keep.
        max_ngram: Words of the longest n-gram.
        buckets: Number of buckets that n-grams share.
        smoothing: Added to the count of each bucket.
        temperature: Factor of the Gumbel noise; 1 samples in proportion to the importance, 0 takes the most important.
        seed: Seed of the noise.

    Raises:
        ConfigurationError: If not exactly one of fraction and number is set, or a number is out of range.
    """

    target: Source | str = dataclasses.field(kw_only=False)
    fraction: float | None = None
    num_documents: int | None = None
    max_ngram: int = 2
    buckets: int = 10_000
    smoothing: float = 1e-5
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.fraction is None) == (self.num_documents is None) or (self.fraction or 0) > 1:
            raise ConfigurationError(
                f"ImportanceResampling needs either fraction= (up to 1) or num_documents=, got {self.fraction} and "
                f"{self.num_documents}."
            )

    def summarize(self, documents: Sequence[Document]) -> Arrays:
        """Return the buckets of all n-grams, their number in each document, and the noise.

        Args:
            documents: Documents of a shard.
        """
        features = [self._buckets_of(document.text) for document in documents]
        return {
            "buckets": np.concatenate([np.zeros(0, np.uint32), *features]),
            "sizes": np.array([len(values) for values in features], np.int64),
            "noise": self._noise([document.id for document in documents]),
        }

    def decide(self, summaries: Sequence[Arrays]) -> Arrays:
        """Return the log-ratio of each bucket, and the smallest score that is kept.

        Args:
            summaries: Summaries of all shards.

        Raises:
            DataError: If the target has no words.
        """
        target, corpus = np.zeros(self.buckets), np.zeros(self.buckets)
        for text in as_source(self.target).documents():
            target += np.bincount(self._buckets_of(text), minlength=self.buckets)
        if not target.any():
            raise DataError(f"The target {self.target!r} of ImportanceResampling has no words.")
        for summary in summaries:
            corpus += np.bincount(summary["buckets"], minlength=self.buckets)
        log_ratio = np.log(_distribution(target, self.smoothing)) - np.log(_distribution(corpus, self.smoothing))
        scores = np.concatenate([np.zeros(0), *(self._scores(summary, log_ratio) for summary in summaries)])
        count = round(len(scores) * self.fraction) if self.fraction is not None else self.num_documents or 0
        largest = np.sort(scores)[::-1][:count]
        return {"log_ratio": log_ratio, "minimum": largest[-1] if len(largest) else np.array(np.inf)}

    def apply(self, document: Document, decision: Arrays) -> Document | Removed:
        """Return the document, or its removal with its score.

        Args:
            document: One of the documents that were summarized.
            decision: Result of `decide`.
        """
        noise = float(self._noise([document.id])[0])
        score = float(decision["log_ratio"][self._buckets_of(document.text)].sum()) + noise
        minimum = float(decision["minimum"])
        return document if score >= minimum else Removed(document, "importance", score, minimum)

    def _buckets_of(self, text: str) -> NDArray[np.uint32]:
        return (ngram_features(text, self.max_ngram) % self.buckets).astype(np.uint32)

    def _noise(self, ids: Sequence[str]) -> NDArray[np.float64]:
        uniform = np.maximum(uniform_of_ids(ids, self.seed), 1e-300)
        noise: NDArray[np.float64] = -self.temperature * np.log(-np.log(uniform))
        return noise

    @staticmethod
    def _scores(summary: Arrays, log_ratio: NDArray[np.float64]) -> NDArray[np.float64]:
        ends = np.cumsum(summary["sizes"])
        parts = np.split(summary["buckets"], ends[:-1]) if len(ends) else []
        scores: NDArray[np.float64] = np.array([log_ratio[part].sum() for part in parts], np.float64)
        return scores + np.asarray(summary["noise"], np.float64)


def _distribution(counts: NDArray[np.float64], smoothing: float) -> NDArray[np.float64]:
    smoothed = counts / max(counts.sum(), 1) + smoothing
    distribution: NDArray[np.float64] = smoothed / smoothed.sum()
    return distribution

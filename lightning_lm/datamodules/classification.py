"""`QualityDataModule`: good texts against others, as hashed n-grams for `NgramClassifier`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lm.data import Source, as_source, hold_out
from lightning_lm.errors import DataError
from lightning_lm.models import NgramClassifier
from lightning_lm.parts import Limit, check_numbers

__all__ = ["QualityDataModule"]

AnySource = Source | str | Path | Iterable[Any] | Callable[[], Iterable[Any]]
Example = tuple[NDArray[np.int64], int]


class QualityDataModule(LightningDataModule):
    """Texts of two classes for `ClassificationModule`: class 1 is good, class 0 is other.

    N-grams are hashed once, when training is set up, and kept in memory: 8 bytes a word and n. Texts for validation are
    chosen by a hash of their content.

    Args:
        good: Good texts: a file, a folder, a `Source`, an iterable of strings or records, or a function that returns
            one.
        other: The same for texts as they come.
        validation: Fraction of each held out for validation; 0 for none.
        batch_size: Texts per optimizer step.
        max_ngram: Words of the longest n-gram; by default that of the model.
        seed: Seed of the order.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    def __init__(
        self,
        good: AnySource,
        other: AnySource,
        *,
        validation: float = 0.1,
        batch_size: int = 256,
        max_ngram: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        limits = {"validation": Limit.BELOW_ONE, "batch_size": Limit.COUNT, "max_ngram": Limit.COUNT}
        check_numbers(limits, {"validation": validation, "batch_size": batch_size, "max_ngram": max_ngram})
        self._sources = (as_source(other), as_source(good))
        self.batch_size, self._validation, self._max_ngram, self._seed = batch_size, validation, max_ngram, seed
        self._train: list[Example] = []
        self._held_out: list[Example] = []

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Read the texts and hash their n-grams.

        Raises:
            DataError: If a class has no text.
        """
        if self._train:
            return
        from lightning_lm.curation.ngram_features import ngram_features  # no other data module pays for this import

        max_ngram = self._max_ngram or self._ngram_of_model()
        for label, source in enumerate(self._sources):
            sides = (source, None) if self._validation == 0 else hold_out(source, self._validation)
            for side, examples in zip(sides, (self._train, self._held_out), strict=True):
                if side is not None:
                    examples += ((ngram_features(text, max_ngram), label) for text in side.documents())
        counts = np.bincount([label for _, label in self._train], minlength=2)
        if not counts.all():
            raise DataError(f"There are {counts[1]} good and {counts[0]} other texts to train on; both are needed.")
        rank_zero_info(f"{counts[1]:,} good and {counts[0]:,} other texts, {len(self._held_out):,} for validation.")

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches for one epoch."""
        generator = torch.Generator().manual_seed(self._seed)
        train: Any = self._train
        return DataLoader(train, self.batch_size, shuffle=True, generator=generator, collate_fn=_collate)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the texts for validation; nothing if none are held out."""
        held_out: Any = self._held_out
        return DataLoader(held_out, self.batch_size, collate_fn=_collate) if self._held_out else []

    def _ngram_of_model(self) -> int:
        model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        return model.max_ngram if isinstance(model, NgramClassifier) else 2


def _collate(examples: list[Example]) -> dict[str, Tensor]:
    from lightning_lm.curation.ngram_features import ngram_batch

    features, labels = zip(*examples, strict=True)
    return {**ngram_batch(features), "labels": torch.tensor(labels)}

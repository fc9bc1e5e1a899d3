"""`TextDataModule`: from text to batches in a Trainer, prepared once and resumed exactly."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lm.data import BestFit, Packing, Source, StandardLibrary, TokenStore, TokenStream
from lightning_lm.datamodules.base import ResumableDataModule
from lightning_lm.datamodules.corpus import Corpus, Prepared
from lightning_lm.datamodules.loader import Loading, RowStream, ValidationLoader
from lightning_lm.errors import ConfigurationError
from lightning_lm.protocols import Tokenizer
from lightning_lm.tokenizers import TokenizerPart

__all__ = ["TextDataModule"]

AnySource = Source | str | Path | Iterable[Any] | Callable[[], Iterable[Any]]


class TextDataModule(ResumableDataModule):
    """Packed rows of text for pretraining, from any source, in an order that only the seed decides.

    The tokenizer is trained or loaded and the text is tokenized once; both are kept in a cache and used again. The
    position in the data is one integer, the rows the optimizer has been given, so a checkpoint resumes exactly with
    other workers, micro-batches or ranks.

    Args:
        train: A file, a folder, a `Source`, an iterable of strings or records, or a function that returns one.
        validation: The same for validation, or the fraction of ``train``'s documents to hold out for it; 0 for none.
        tokenizer: A tokenizer, or a part that makes one; it is trained on the train side alone. By default that of the
            checkpoint from which the model starts, or else `TrainBPE`.
        context_length: Positions the model sees. Rows are one token longer.
        batch_size: Rows per optimizer step, over all ranks and micro-batches.
        packing: Layout of documents in rows.
        seed: Seed of the order of the rows.
        loading: Settings of workers and cache; none changes which rows are seen.

    Attributes:
        tokenizer: The tokenizer, or None until ``setup`` has made it.
        context_length: As given.
        batch_size: As given.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    special_tokens: ClassVar[tuple[str, ...]] = ()
    """Further special tokens of a tokenizer that is trained because none is given."""

    def __init__(
        self,
        train: AnySource = StandardLibrary(),
        validation: float | AnySource = 0.05,
        *,
        tokenizer: TokenizerPart | Tokenizer | None = None,
        context_length: int = 256,
        batch_size: int = 16,
        packing: Packing = BestFit(),
        seed: int = 0,
        loading: Loading = Loading(),
    ) -> None:
        super().__init__(batch_size=batch_size, loading=loading)
        if context_length < 1:
            raise ConfigurationError(f"context_length must be at least 1, got {context_length}.")
        self._corpus = Corpus(train, validation, tokenizer, loading, self.special_tokens)
        self.tokenizer: Tokenizer | None = self._corpus.tokenizer
        self.context_length = context_length
        self._packing, self._seed = packing, seed
        self._validation: RowStream | None = None

    def validation_texts(self) -> Iterator[str]:
        """Yield the documents for validation as they were before tokenizing."""
        return self._corpus.validation_texts()

    def train_token_counts(self) -> npt.NDArray[np.int64]:
        """Return how often each token id occurs in the training text, int64 [vocab_size]."""
        from lightning_lm.evals import token_counts  # the tasks are not needed to train

        assert self.tokenizer is not None, "setup() comes first"
        stores = self._corpus.prepare(show_progress=False).train
        total = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for store in stores:
            total += token_counts(store.tokens, self.tokenizer.vocab_size)
        return total

    def train_documents(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
        """Yield the training text of each source: its token ids, and where each document ends. Both are on the disk."""
        for store in self._corpus.prepare(show_progress=False).train:
            yield store.tokens, store.ends

    def prepare_data(self) -> None:
        """Train the tokenizer and tokenize, where the cache does not hold the result yet. Runs on one rank a machine.

        Raises:
            DataError: If the text cannot be read or used, or the disk is full.
        """
        show_progress = self._loading.show_progress
        self.tokenizer = self._corpus.prepare(show_progress=show_progress, trainer=self.trainer).tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Open the result of `prepare_data` in the cache, and plan the rows."""
        prepared = self._corpus.prepare(show_progress=False, trainer=self.trainer)
        self.tokenizer = prepared.tokenizer
        self._train = self.rows(prepared.train, packing=self._packing, seed=self._seed)
        if prepared.validation is not None:
            self._validation = self.rows(prepared.validation, shuffle=False)
        self.attach(stage)
        if stage == "fit":
            self._report(prepared, self._train.rows_per_epoch)

    def rows(self, stores: TokenStore | dict[TokenStore, float], **settings: Any) -> RowStream:
        """Return the rows of stores.

        Args:
            stores: A store, or stores with weights.
            settings: ``packing``, ``seed`` and ``shuffle`` of a `TokenStream`.
        """
        return TokenStream(stores, row_length=self.context_length + 1, **settings)

    def _report(self, prepared: Prepared, num_rows: int) -> None:
        """Report the size of the text and the number of epochs; warn if one batch repeats it."""
        steps = getattr(self.trainer, "max_steps", -1)
        message = f"Training text: {_size_of(*prepared.train)}, {num_rows:,} rows of {self.context_length:,} tokens"
        if steps > 0:
            epochs = steps * self.batch_size / num_rows
            message += f"\n{steps:,} steps of {self.batch_size:,} rows are {epochs:,.3g} epochs"
        if prepared.validation is not None:
            message += f"\nValidation text: {_size_of(prepared.validation)}"
        if self._loading.show_progress:
            rank_zero_info(message)
        if num_rows < self.batch_size:
            rank_zero_warn(
                f"The training text ({_size_of(*prepared.train)}) gives {num_rows} row(s), fewer than one batch of "
                f"{self.batch_size}: every step repeats all of it. Check --data.train, or lower --data.batch_size."
            )

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        """Return the validation rows of this rank; nothing where no text is held out."""
        return [] if self._validation is None else ValidationLoader(self._validation, self._shard(), self._loading)

    def test_dataloader(self) -> ValidationLoader | list[Any]:
        """Return the same rows as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ValidationLoader | list[Any]:
        """Return the same rows as for validation."""
        return self.val_dataloader()


def _size_of(*stores: TokenStore) -> str:
    documents, tokens = sum(map(len, stores)), sum(store.num_tokens for store in stores)
    return f"{documents:,} document(s), {tokens:,} tokens"

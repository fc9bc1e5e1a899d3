"""`ChatDataModule`: examples to imitate, packed whole into rows."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lm.data import (
    ChatTemplate,
    ExampleSource,
    Plain,
    SupervisedRows,
    SupervisedStore,
    TokenStream,
    split_sides,
    store_examples,
    texts_of,
)
from lightning_lm.datamodules.base import ResumableDataModule
from lightning_lm.datamodules.corpus import make_tokenizer
from lightning_lm.datamodules.loader import Loading, RowStream, ValidationLoader
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import cache_folder
from lightning_lm.tokenizers import TokenizerPart

__all__ = ["ChatDataModule"]

AnyExamples = ExampleSource | str | Path | Iterable[Any] | Callable[[], Iterable[Any]]


class ChatDataModule(ResumableDataModule):
    """Questions with completions, or conversations, as packed rows of tokens in an order that only the seed decides.

    Records have ``prompt`` and ``completion``, each a text or a list of messages, or ``messages``. They are encoded
    once and kept in a cache. Several examples share a row; none is split, sees another, or continues another's
    positions. Examples that are truncated or dropped are reported.

    Args:
        train: A file of records (JSON lines, JSON, CSV, Parquet, Arrow), a folder of such, an iterable of records (a
            Hugging Face dataset), a function that returns one, or an `ExampleSource`: `Examples` also names the form
            of the records, and the policy for bad ones.
        validation: The same for validation, or the fraction of ``train`` to hold out for it; 0 for none.
        tokenizer: A tokenizer, or a part that makes one; it is trained on the texts of ``train``. By default that of
            the checkpoint from which the model starts.
        template: Chat template, renders conversations as text.
        rows: Context length, target tokens of an example, and treatment of longer ones.
        batch_size: Rows per optimizer step, over all ranks and micro-batches.
        seed: Seed of the order of the rows.
        loading: Settings of workers and cache; none changes which rows are seen.

    Attributes:
        tokenizer: The tokenizer, or None until ``setup`` has made it.
        template: As given.
        context_length: Positions the model sees.
        batch_size: As given.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    def __init__(
        self,
        train: AnyExamples,
        validation: float | AnyExamples = 0.05,
        *,
        tokenizer: TokenizerPart | Tokenizer | None = None,
        template: ChatTemplate = Plain(),
        rows: SupervisedRows = SupervisedRows(),
        batch_size: int = 16,
        seed: int = 0,
        loading: Loading = Loading(),
    ) -> None:
        super().__init__(batch_size=batch_size, loading=loading)
        self._sources = split_sides(train, validation)
        self._given_tokenizer, self.template, self._rows, self._seed = tokenizer, template, rows, seed
        self.tokenizer: Tokenizer | None = None if isinstance(tokenizer, TokenizerPart) else tokenizer
        self.context_length = rows.context_length
        self._validation: RowStream | None = None

    def prepare_data(self) -> None:
        """Make the tokenizer and encode the examples, where the cache does not hold them. Runs on one rank a machine.

        Raises:
            DataError: If a record cannot be used; names it.
        """
        for store in self._stores():
            if store is not None and (report := store.counts.report(self.context_length + 1)) is not None:
                rank_zero_warn(report)

    def setup(self, stage: str | None = None) -> None:
        """Open the result of `prepare_data` in the cache, and plan the rows."""
        if self._train is None:
            train, validation = self._stores()
            assert train is not None
            self._train = self._stream(train, shuffle=True)
            self._validation = None if validation is None else self._stream(validation, shuffle=False)
            rank_zero_info(
                f"{train.counts.kept:,} examples in {self._train.rows_per_epoch:,} rows; "
                f"{train.counts.num_learned:,} of {train.num_tokens:,} are target tokens."
            )
        self.attach(stage)

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        """Return the validation rows of this rank; nothing where nothing is held out."""
        return [] if self._validation is None else ValidationLoader(self._validation, self._shard(), self._loading)

    def test_dataloader(self) -> ValidationLoader | list[Any]:
        """Return the same rows as for validation."""
        return self.val_dataloader()

    def validation_texts(self) -> Iterator[str]:
        """Yield the texts of the validation examples."""
        source = self._sources[1]
        return iter(()) if source is None else texts_of(source)

    def _stores(self) -> tuple[SupervisedStore, SupervisedStore | None]:
        cache = cache_folder(self._loading.cache_dir)
        train, validation = self._sources
        if self.tokenizer is None:
            self.tokenizer = make_tokenizer(
                self._given_tokenizer, lambda: texts_of(train), cache / "tokenizers", self.trainer
            )
        tokenizer = self.tokenizer

        def stored(source: ExampleSource) -> SupervisedStore:
            workers = self._loading.tokenize_workers
            return store_examples(source, tokenizer, self.template, self._rows, cache / "examples", num_workers=workers)

        return stored(train), None if validation is None else stored(validation)

    def _stream(self, store: SupervisedStore, *, shuffle: bool) -> RowStream:
        return TokenStream(
            store, row_length=self.context_length + 1, packing=self._rows.packing, seed=self._seed, shuffle=shuffle
        )

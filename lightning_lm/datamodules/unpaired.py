"""`UnpairedDataModule`: completions that are desirable or not, for KTO."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lm.data.post_training.chat import ChatTemplate, Plain
from lightning_lm.data.post_training.examples import ExampleSource, split_sides, texts_of
from lightning_lm.data.post_training.preference import PairRows
from lightning_lm.data.post_training.unpaired import UnpairedExamples, UnpairedStream
from lightning_lm.datamodules.base import ResumableDataModule
from lightning_lm.datamodules.corpus import make_tokenizer
from lightning_lm.datamodules.loader import Loading, ValidationLoader
from lightning_lm.errors import ConfigurationError
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import cache_folder
from lightning_lm.tokenizers import TokenizerPart

__all__ = ["UnpairedDataModule"]

AnyExamples = ExampleSource | str | Path | Iterable[Any] | Callable[[], Iterable[Any]]


class UnpairedDataModule(ResumableDataModule):
    """Completions with labels as `types.UnpairedBatch`, in an order that only the seed decides.

    Records have ``prompt``, ``completion`` and ``label`` (true for a desirable completion), or are preferences, which
    give one completion of each kind. They are encoded in memory when training is set up.

    Args:
        train: A file of records (JSON lines, JSON, CSV, Parquet, Arrow), a folder of such, an iterable of records (a
            Hugging Face dataset), a function that returns one, or an `ExampleSource`: `Examples` also names the form
            of the records, and what is done with bad ones.
        validation: The same for validation, or the fraction of ``train`` to hold out for it, or None.
        tokenizer: A tokenizer, or a part that makes one; by default that of the checkpoint from which the model starts.
        template: Chat template, renders conversations as text.
        rows: Longest row, and treatment of longer ones. ``steps_sorted`` must be 1.
        batch_size: Completions per optimizer step, over all ranks and micro-batches; at least 2.
        seed: Seed of the order.
        loading: Settings of workers and cache; none changes which rows are seen.

    Attributes:
        tokenizer: The tokenizer, or None until ``setup`` has made it.
        batch_size: As given.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    def __init__(
        self,
        train: AnyExamples,
        validation: float | AnyExamples | None = None,
        *,
        tokenizer: TokenizerPart | Tokenizer | None = None,
        template: ChatTemplate = Plain(),
        rows: PairRows = PairRows(),
        batch_size: int = 64,
        seed: int = 0,
        loading: Loading = Loading(),
    ) -> None:
        super().__init__(batch_size=batch_size, loading=loading)
        if batch_size < 2:
            raise ConfigurationError(f"batch_size must be at least 2 for the KL estimate of KTO, got {batch_size}.")
        if rows.steps_sorted != 1:
            raise ConfigurationError(
                f"steps_sorted={rows.steps_sorted} must be 1: KTO's steps are not sorted by length."
            )
        self._sources = split_sides(train, validation)
        self._given_tokenizer, self._template, self._rows, self._seed = tokenizer, template, rows, seed
        self.longest_row: int = rows.max_length
        """Most tokens of a prompt and a completion."""
        self.tokenizer: Tokenizer | None = None if isinstance(tokenizer, TokenizerPart) else tokenizer
        self._validation: UnpairedStream | None = None

    def setup(self, stage: str | None = None) -> None:
        """Make the tokenizer and encode the completions.

        Raises:
            DataError: If a record cannot be used, or all completions have the same label.
        """
        if self._train is None:
            train, validation = self._sources
            cache = cache_folder(self._loading.cache_dir) / "tokenizers"
            self.tokenizer = make_tokenizer(self._given_tokenizer, lambda: texts_of(train), cache, self.trainer)
            self._train = self._stream(train, self.tokenizer, shuffle=True)
            if validation is not None:
                self._validation = self._stream(validation, self.tokenizer, shuffle=False)
        self.attach(stage)

    def _stream(self, source: ExampleSource, tokenizer: Tokenizer, *, shuffle: bool) -> UnpairedStream:
        examples = UnpairedExamples(source, tokenizer, self._template, self._rows)
        good = int(examples.desirable.sum())
        rank_zero_info(f"{len(examples):,} completions, {good:,} of them desirable.")
        if examples.too_long:
            rank_zero_warn(
                f"{examples.too_long:,} completions longer than {self._rows.max_length:,} tokens are dropped."
            )
        return UnpairedStream(examples, seed=self._seed, shuffle=shuffle, step_size=self.batch_size)

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        """Return the validation completions of this rank; nothing where there are none."""
        return [] if self._validation is None else ValidationLoader(self._validation, self._shard(), self._loading)

    def test_dataloader(self) -> ValidationLoader | list[Any]:
        """Return the same completions as for validation."""
        return self.val_dataloader()

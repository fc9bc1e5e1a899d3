"""`PreferenceDataModule`: pairs of completions for preference optimization and reward models."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_lm.data.post_training.chat import ChatTemplate, Plain
from lightning_lm.data.post_training.examples import ExampleSource, split_sides, texts_of
from lightning_lm.data.post_training.preference import PairRows, PairStream, PreferencePairs
from lightning_lm.datamodules.base import ResumableDataModule
from lightning_lm.datamodules.corpus import make_tokenizer
from lightning_lm.datamodules.loader import Loading, ValidationLoader
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import cache_folder
from lightning_lm.tokenizers import TokenizerPart

__all__ = ["PreferenceDataModule"]

AnyExamples = ExampleSource | str | Path | Iterable[Any] | Callable[[], Iterable[Any]]


class PreferenceDataModule(ResumableDataModule):
    """Pairs of completions as `types.PairBatch`, in an order that only the seed decides.

    Records have ``chosen`` and ``rejected``, as text or as lists of messages, and may have ``prompt`` and ``margin``;
    a prompt that is not given is what both completions begin with. They are encoded in memory when training is set
    up; pairs that are left out or cut are reported.

    Args:
        train: A file of records (JSON lines, JSON, CSV, Parquet, Arrow), a folder of such, an iterable of records (a
            Hugging Face dataset), a function that returns one, or an `ExampleSource`: `Examples` also names the form
            of the records, and what is done with bad ones.
        validation: The same for validation, or the fraction of ``train`` to hold out for it, or None.
        tokenizer: A tokenizer, or a part that makes one; by default that of the checkpoint from which the model starts.
            One that is to be trained is, on the texts of ``train``.
        template: Chat template, renders conversations as text.
        rows: Longest row, and treatment of longer pairs.
        batch_size: Pairs per optimizer step, over all ranks and micro-batches.
        seed: Seed of the order.
        loading: Settings of workers and cache; none changes which rows are seen.

    Attributes:
        tokenizer: The tokenizer, or None until ``setup`` has made it.
        template: As given.
        batch_size: As given.
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
        self._sources = split_sides(train, validation)
        self._given_tokenizer, self.template, self._rows, self._seed = tokenizer, template, rows, seed
        self.longest_row: int = rows.max_length
        """Most tokens of a prompt and an answer."""
        self.rows_per_step = 2 * batch_size
        """Both answers of each pair of an optimizer step, over all ranks."""
        self.tokenizer: Tokenizer | None = None if isinstance(tokenizer, TokenizerPart) else tokenizer
        self.train_pairs: PreferencePairs | None = None
        """Training pairs, set by ``setup``."""
        self.validation_pairs: PreferencePairs | None = None

    def setup(self, stage: str | None = None) -> None:
        """Make the tokenizer and encode the pairs.

        Raises:
            DataError: If a record is no preference, or no pair is left.
        """
        if self.train_pairs is None:
            train, validation = self._sources
            cache = cache_folder(self._loading.cache_dir) / "tokenizers"
            self.tokenizer = make_tokenizer(self._given_tokenizer, lambda: texts_of(train), cache, self.trainer)
            self.train_pairs = self._encoded(train, self.tokenizer)
            self.validation_pairs = None if validation is None else self._encoded(validation, self.tokenizer)
            self._train = PairStream(
                self.train_pairs, seed=self._seed, step_size=self.batch_size, steps_sorted=self._rows.steps_sorted
            )
        self.attach(stage)

    def _encoded(self, source: ExampleSource, tokenizer: Tokenizer) -> PreferencePairs:
        pairs = PreferencePairs.from_records(source, tokenizer, self.template, self._rows)
        report = pairs.counts.report(self._rows.max_length)
        if report is not None:
            rank_zero_warn(report)
        return pairs

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        """Return the validation pairs of this rank; nothing where there are none."""
        stream = self._validation_stream()
        return [] if stream is None else ValidationLoader(stream, self._shard(), self._loading)

    def test_dataloader(self) -> ValidationLoader | list[Any]:
        """Return the same pairs as for validation."""
        return self.val_dataloader()

    def _validation_stream(self) -> PairStream | None:
        if self.validation_pairs is None:
            return None
        assert self.train_pairs is not None
        return PairStream(self.validation_pairs, shuffle=False, first_id=len(self.train_pairs))

    # --- what a reference that is computed before training asks for ---

    @property
    def num_pairs(self) -> int:
        """Pairs for training and validation together."""
        return sum(len(pairs) for pairs in (self.train_pairs, self.validation_pairs) if pairs is not None)

    @property
    def pairs_key(self) -> str:
        """Hex digest of the pairs, in the order of their numbers, and of what made their ids."""
        assert self.tokenizer is not None, "setup() comes first"
        pairs = [pairs.fingerprint for pairs in (self.train_pairs, self.validation_pairs) if pairs is not None]
        made_by = [self.tokenizer.fingerprint, self.template.to_dict(), self._rows.to_dict()]
        return hashlib.sha256(json.dumps([pairs, made_by], sort_keys=True).encode()).hexdigest()

    def numbered_pairs(self) -> Iterator[dict[str, Tensor]]:
        """Yield every pair once over all ranks, first those for training; equally many batches on each rank."""
        assert self.train_pairs is not None, "setup() comes first"
        streams = [PairStream(self.train_pairs, shuffle=False), self._validation_stream()]
        for stream in streams:
            if stream is not None:
                yield from ValidationLoader(stream, self._shard(), self._loading)

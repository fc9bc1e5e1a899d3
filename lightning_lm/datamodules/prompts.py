"""`PromptDataModule`: prompts for reinforcement learning, with the columns that rewards read."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lm.data import ChatTemplate, Curriculum, ExampleSource, Plain, split_sides, texts_of
from lightning_lm.data.post_training.curriculum import LevelState
from lightning_lm.data.post_training.prompts import LeveledPrompts, PromptBatch, PromptStream
from lightning_lm.datamodules.base import check_same_rows
from lightning_lm.datamodules.corpus import make_tokenizer
from lightning_lm.datamodules.loader import DataShard, Loading
from lightning_lm.errors import ConfigurationError
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import cache_folder
from lightning_lm.tokenizers import TokenizerPart

__all__ = ["PromptDataModule", "PromptLoader", "PromptValidationLoader"]

AnyExamples = ExampleSource | str | Path | Iterable[Any] | Callable[[], Iterable[Any]]

_VALIDATION_PROMPTS = 256
"""Prompts of a validation batch; the rollout plan limits how many are completed at once."""


class PromptDataModule(LightningDataModule):
    """Prompts in an order that only the seed decides; a prompt is never divided between ranks.

    Records have a ``prompt``, a text or a list of messages; their other fields are the columns that rewards get. A
    module that has ``experience_loader`` (`GRPOModule`, `PPOModule`) trains on the experience from them, any other on
    `data.post_training.prompts.PromptBatch`. The position is one integer, the prompts handed out.

    Args:
        train: A file of records (JSON lines, JSON, CSV, Parquet, Arrow), a folder of such, an iterable of records (a
            Hugging Face dataset), a function that returns one, or an `ExampleSource`: `Examples` also names the form
            of the records, and the policy for bad ones.
        validation: The same for validation, or the fraction of ``train`` to hold out for it; 0 for none.
        tokenizer: A tokenizer, or a part that makes one; it is trained on the texts of ``train``. By default that of
            the checkpoint from which the model starts.
        template: Chat template, renders conversations as text.
        batch_size: Prompts of a rollout, over all ranks.
        max_prompt_tokens: Longest prompt, longer ones are dropped; no limit by default.
        seed: Seed of the order.
        loading: Cache folder of a trained tokenizer, and whether other prompts are accepted on resuming.

    Attributes:
        tokenizer: The tokenizer, or None until ``setup`` has made it.
        template: As given.
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
        batch_size: int = 32,
        max_prompt_tokens: int | None = None,
        seed: int = 0,
        loading: Loading = Loading(),
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigurationError(f"batch_size must be at least 1, got {batch_size}.")
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ConfigurationError(
                f"max_prompt_tokens must be at least 1, got {max_prompt_tokens}; null keeps every prompt."
            )
        self._sources = split_sides(train, validation)
        self._given_tokenizer, self.template, self._seed, self._loading = tokenizer, template, seed, loading
        self._max_prompt_tokens = max_prompt_tokens
        self.tokenizer: Tokenizer | None = None if isinstance(tokenizer, TokenizerPart) else tokenizer
        self.batch_size = batch_size
        self.longest_row: int | None = None
        """Length of a row of training: unknown before completions are sampled."""
        self._train: PromptStream | LeveledPrompts | None = None
        self._validation: PromptStream | None = None
        self._taken_at = -1
        self.prompts_consumed = 0
        """Prompts that were handed out since training began, over all ranks."""

    def setup(self, stage: str | None = None) -> None:
        """Make the tokenizer and read the prompts.

        Raises:
            DataError: If a record has no prompt, or none is left.
        """
        if self._train is None:
            train, validation = self._sources
            if self.tokenizer is None:
                cache = cache_folder(self._loading.cache_dir) / "tokenizers"
                self.tokenizer = make_tokenizer(self._given_tokenizer, lambda: texts_of(train), cache, self.trainer)
            if isinstance(train, Curriculum):
                self._train = LeveledPrompts(train, [self._stream(level, shuffle=True) for level in train.levels])
            else:
                self._train = self._stream(train, shuffle=True)
            self._validation = None if validation is None else self._stream(validation, shuffle=False)
        if stage == "fit" and self.trainer is not None and not self.trainer.global_step:
            self.prompts_consumed = 0
            if self.curriculum is not None:
                self.curriculum.restart()

    @property
    def curriculum(self) -> LeveledPrompts | None:
        """The prompts to train on, if their difficulty follows a `Curriculum`; it must be told of each rollout."""
        return self._train if isinstance(self._train, LeveledPrompts) else None

    def _stream(self, source: ExampleSource, *, shuffle: bool) -> PromptStream:
        assert self.tokenizer is not None
        limit = self._max_prompt_tokens
        stream = PromptStream(source, self.tokenizer, self.template, max_tokens=limit, seed=self._seed, shuffle=shuffle)
        if stream.too_long:
            rank_zero_warn(f"{stream.too_long:,} prompts longer than {limit:,} tokens are dropped.")
        return stream

    def train_dataloader(self) -> Any:
        """Return the module's experience from the prompts, or the prompts of this rank themselves."""
        assert self._train is not None, "setup() comes first"
        make = getattr(getattr(self.trainer, "lightning_module", None), "experience_loader", None)
        if make is None:
            return PromptLoader(self, self._train, DataShard.of(self.trainer, self.batch_size))
        shard = DataShard.of(self.trainer, self.batch_size, micro_batches=1)
        return make(PromptLoader(self, self._train, shard))

    def val_dataloader(self) -> Any:
        """Return the held-out prompts of this rank; nothing where nothing is held out."""
        if self._validation is None:
            return []
        return PromptValidationLoader(self._validation, DataShard.of(self.trainer, self.batch_size, micro_batches=1))

    def test_dataloader(self) -> Any:
        """Return the same prompts as for validation."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the fingerprint of the prompts it counts."""
        if self._train is None:
            return {}
        # A run that is stopped while it samples has not trained on the newest prompts: they are sampled again.
        untrained = self.trainer is not None and self.trainer.interrupted and self.trainer.global_step == self._taken_at
        state = {
            "samples": self.prompts_consumed - (self.batch_size if untrained else 0),
            "fingerprint": self._train.fingerprint,
            "rows": self._train.description,
        }
        if self.curriculum is None:
            return state
        level = self.curriculum.state if untrained else self.curriculum.next_state()
        return {**state, "level": dataclasses.asdict(level)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the position of a checkpoint.

        Raises:
            FingerprintError: If training resumes and its prompts would not be the checkpoint's.
        """
        if self.trainer is None or self.trainer.state.fn == "fit":
            assert self._train is not None, "setup() comes first"
            check_same_rows(state_dict, self._train, accept=self._loading.accept_changed_data)
            self.prompts_consumed, self._taken_at = int(state_dict["samples"]), -1
            if self.curriculum is not None and "level" in state_dict:
                self.curriculum.resume(LevelState(**state_dict["level"]))

    def take(self) -> int:
        """Hand out the prompts of a rollout; return the place of the first."""
        overfits = self.trainer is not None and self.trainer.overfit_batches  # type: ignore[attr-defined]
        first = 0 if overfits else self.prompts_consumed
        self._taken_at = -1 if self.trainer is None else self.trainer.global_step
        self.prompts_consumed += self.batch_size
        if self.curriculum is not None:
            self.curriculum.resume(self.curriculum.next_state())
        return first


class PromptLoader:
    """The prompts of each rollout, from wherever training stands. It has a length, so nothing is fetched ahead.

    Args:
        data: Keeps the position.
        stream: The prompts.
        shard: Part of the data that this rank reads.

    Attributes:
        prompts_per_batch: Prompts of this rank in each batch.
    """

    def __init__(self, data: PromptDataModule, stream: PromptStream | LeveledPrompts, shard: DataShard) -> None:
        self._data, self._stream, self._shard = data, stream, shard
        self.prompts_per_batch = shard.rows

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return -(-self._stream.rows_per_epoch // self._shard.batch_size) * self._shard.micro_batches

    def __iter__(self) -> Iterator[PromptBatch]:
        shard, first = self._shard, 0
        for number in range(len(self)):
            micro_batch = number % shard.micro_batches
            if micro_batch == 0:
                first = self._data.take()
            begin = first + (micro_batch * shard.num_ranks + shard.rank) * shard.rows
            yield self._stream.batch(np.arange(begin, begin + shard.rows))

    def spare(self, number: int, count: int) -> PromptBatch:
        """Return prompts that take the place of some that teach nothing, others on each rank.

        Args:
            number: Number of earlier calls in this rollout.
            count: Prompts that are needed.
        """
        places = np.arange(count) * self._shard.num_ranks + self._shard.rank
        return self._stream.spare(places, self._data.prompts_consumed, number)

    def state_dict(self) -> dict[str, int]:
        """Return the position, for Lightning to see that this loader can be resumed; the datamodule restores it."""
        return {"samples": self._data.prompts_consumed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Do nothing: the datamodule has restored the position."""


class PromptValidationLoader:
    """Every held-out prompt once, equally many batches of equally many prompts on each rank.

    Where prompts run out, some come again that are not counted.

    Args:
        stream: The prompts; only its first epoch is read.
        shard: Part of the data that this rank reads.
    """

    def __init__(self, stream: PromptStream, shard: DataShard) -> None:
        self._stream, self._shard = stream, shard
        self._prompts = min(_VALIDATION_PROMPTS, -(-stream.rows_per_epoch // shard.num_ranks))

    def __len__(self) -> int:
        """Return the number of batches of this rank, the same for every rank."""
        return -(-self._stream.rows_per_epoch // (self._prompts * self._shard.num_ranks))

    def __iter__(self) -> Iterator[PromptBatch]:
        total = self._stream.rows_per_epoch
        for number in range(len(self)):
            places = (number * self._prompts + np.arange(self._prompts)) * self._shard.num_ranks + self._shard.rank
            batch = self._stream.batch(np.where(places < total, places, 0))
            yield cast(PromptBatch, {**batch, "counted": (places < total).tolist()})

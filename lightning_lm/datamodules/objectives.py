"""Data modules whose rows an objective rewrites: hidden tokens, and sources with targets."""

from typing import Any, ClassVar

from lightning_lm.data import (
    BestFit,
    Denoiser,
    MaskedLM,
    MaskedStream,
    PrefixLM,
    PrefixStream,
    SourceTargetStream,
    SpanCorruption,
    StandardLibrary,
    SupervisedStore,
    TokenStore,
    TokenStream,
    Vocabulary,
)
from lightning_lm.data.objectives import MASK, SENTINELS
from lightning_lm.datamodules.chat import ChatDataModule
from lightning_lm.datamodules.loader import Loading, RowStream
from lightning_lm.datamodules.text import AnySource, TextDataModule
from lightning_lm.errors import ConfigurationError
from lightning_lm.generation.sources import target_begin
from lightning_lm.protocols import Tokenizer
from lightning_lm.tokenizers import TokenizerPart

__all__ = ["DenoisingDataModule", "MaskedTextDataModule", "PrefixTextDataModule", "Seq2SeqDataModule"]


class MaskedTextDataModule(TextDataModule):
    """Packed rows of text with hidden tokens, other ones in each epoch, for `MaskedLMModule`.

    The order, the position and the cache are those of `TextDataModule`.

    Args:
        train: A file, a folder, a `Source`, an iterable of strings or records, or a function that returns one.
        validation: The same for validation, or the fraction of ``train``'s documents to hold out for it; 0 for none.
        objective: Choice of the hidden tokens.
        tokenizer: A tokenizer with a mask token, or a part that makes one. By default that of the checkpoint from which
            the model starts, or else `TrainBPE` with a mask token.
        context_length: Tokens of a row.
        batch_size: Rows per optimizer step, over all ranks and micro-batches.
        seed: Seed of the order of the rows and of the hidden tokens.
        loading: Settings of workers and cache; none changes which rows are seen.

    Attributes:
        tokenizer: The tokenizer, or None until ``setup`` has made it.

    Raises:
        ConfigurationError: If a number is out of its range, or the tokenizer has no mask token.
    """

    special_tokens: ClassVar[tuple[str, ...]] = (MASK,)

    def __init__(
        self,
        train: AnySource = StandardLibrary(),
        validation: float | AnySource = 0.05,
        *,
        objective: MaskedLM = MaskedLM(),
        tokenizer: TokenizerPart | Tokenizer | None = None,
        context_length: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        loading: Loading = Loading(),
    ) -> None:
        if context_length < 2:
            raise ConfigurationError(f"context_length must be at least 2, got {context_length}.")
        super().__init__(
            train,
            validation,
            tokenizer=tokenizer,
            context_length=context_length,
            batch_size=batch_size,
            seed=seed,
            loading=loading,
        )
        self.objective = objective

    def rows(self, stores: TokenStore | dict[TokenStore, float], **settings: Any) -> RowStream:
        """Return the rows of stores, with hidden tokens."""
        stream = TokenStream(stores, row_length=self.context_length, **settings)
        return MaskedStream(stream, self.objective, _vocabulary(self.tokenizer), seed=self._seed)


class DenoisingDataModule(TextDataModule):
    """Texts as sources and targets, other ones in each epoch, for `Seq2SeqModule`.

    The order, the position and the cache are those of `TextDataModule`.

    Args:
        train: A file, a folder, a `Source`, an iterable of strings or records, or a function that returns one.
        validation: The same for validation, or the fraction of ``train``'s documents to hold out for it; 0 for none.
        objective: Makes source and target of a text.
        tokenizer: A tokenizer with the tokens that the objective needs, or a part that makes one. By default that of
            the checkpoint from which the model starts, or else `TrainBPE` with 100 sentinels.
        context_length: Most tokens of a source, and of a target.
        batch_size: Rows per optimizer step, over all ranks and micro-batches.
        seed: Seed of the order of the rows and of the objective.
        loading: Settings of workers and cache; none changes which rows are seen.

    Attributes:
        tokenizer: The tokenizer, or None until ``setup`` has made it.

    Raises:
        ConfigurationError: If a number is out of its range, or the tokenizer lacks a token that the objective needs.
    """

    special_tokens: ClassVar[tuple[str, ...]] = SENTINELS
    target_follows: ClassVar[bool] = False
    """True if a target stands in the row of its source."""

    def __init__(
        self,
        train: AnySource = StandardLibrary(),
        validation: float | AnySource = 0.05,
        *,
        objective: Denoiser = SpanCorruption(),
        tokenizer: TokenizerPart | Tokenizer | None = None,
        context_length: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        loading: Loading = Loading(),
    ) -> None:
        super().__init__(
            train,
            validation,
            tokenizer=tokenizer,
            context_length=context_length,
            batch_size=batch_size,
            packing=BestFit(),
            seed=seed,
            loading=loading,
        )
        self.objective = objective
        self._text_length = objective.longest_text(context_length, target_follows=self.target_follows)

    def rows(self, stores: TokenStore | dict[TokenStore, float], **settings: Any) -> RowStream:
        """Return the rows of stores as sources and targets."""
        vocabulary = _vocabulary(self.tokenizer)
        self.objective.check(vocabulary, self._text_length)
        stream = TokenStream(stores, row_length=self._text_length + 1, **settings)
        kind = PrefixStream if self.target_follows else SourceTargetStream
        return kind(stream, self.objective, vocabulary, begin_id=_begin(self.tokenizer), seed=self._seed)


class PrefixTextDataModule(DenoisingDataModule):
    """Texts whose source is a prefix that is read in both directions, for `PretrainModule` (a prefix language model).

    The arguments are those of `DenoisingDataModule`; source and target share a row of ``context_length`` tokens.

    Args:
        train: A file, a folder, a `Source`, an iterable of strings or records, or a function that returns one.
        validation: The same for validation, or the fraction of ``train``'s documents to hold out for it; 0 for none.
        objective: Makes source and target of a text.
        tokenizer: A tokenizer with the tokens that the objective needs, or a part that makes one.
        context_length: Positions the model sees.
        batch_size: Rows per optimizer step, over all ranks and micro-batches.
        seed: Seed of the order of the rows and of the objective.
        loading: Settings of workers and cache; none changes which rows are seen.
    """

    special_tokens: ClassVar[tuple[str, ...]] = ()
    target_follows: ClassVar[bool] = True

    def __init__(
        self,
        train: AnySource = StandardLibrary(),
        validation: float | AnySource = 0.05,
        *,
        objective: Denoiser = PrefixLM(),
        tokenizer: TokenizerPart | Tokenizer | None = None,
        context_length: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        loading: Loading = Loading(),
    ) -> None:
        super().__init__(
            train,
            validation,
            objective=objective,
            tokenizer=tokenizer,
            context_length=context_length,
            batch_size=batch_size,
            seed=seed,
            loading=loading,
        )

    @property
    def prompt_is_prefix(self) -> bool:
        """True unless the objective has no sources, as `FillInTheMiddle`."""
        return self.objective.sizes(self.context_length).source > 0


class Seq2SeqDataModule(ChatDataModule):
    """Records of a prompt and a completion as sources and targets, for `Seq2SeqModule`.

    Encoding, lengths, packing, order and position are those of `ChatDataModule`, with the same arguments; target i of a
    row belongs to source i.
    """

    def _stream(self, store: SupervisedStore, *, shuffle: bool) -> RowStream:
        stream = super()._stream(store, shuffle=shuffle)
        assert isinstance(stream, TokenStream)
        vocabulary = _vocabulary(self.tokenizer)
        return SourceTargetStream(stream, None, vocabulary, begin_id=_begin(self.tokenizer), seed=0)


def _vocabulary(tokenizer: Tokenizer | None) -> Vocabulary:
    assert tokenizer is not None, "setup() comes first"
    return Vocabulary.of(tokenizer)


def _begin(tokenizer: Tokenizer | None) -> int:
    assert tokenizer is not None, "setup() comes first"
    return target_begin(tokenizer)

"""The text of a run, its tokenizer (chosen here) and its token stores, made once and found again in a cache."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer

from lightning_lm import __version__
from lightning_lm.data import Mixture, Source, TokenStore, as_source, hold_out, tokenize
from lightning_lm.datamodules.loader import Loading
from lightning_lm.errors import CheckpointError, ConfigurationError, DataError, TokenizerError
from lightning_lm.models.huggingface.peft_adapters import adapter_base, is_adapter_folder
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import cache_folder, locked, remove_abandoned, resolve_checkpoint
from lightning_lm.tokenizers import TokenizerPart, TrainBPE, TrainedTokenizerPart, load_tokenizer
from lightning_lm.tokenizers.base import CHAT_TOKENS, END_OF_TEXT

__all__ = ["Corpus", "Prepared", "cache_folder", "choose_tokenizer", "make_tokenizer"]

_DEFAULT_TOKENIZER = TrainBPE(special_tokens=(END_OF_TEXT, *CHAT_TOKENS))
"""Has the tokens that a later stage needs to train the model to chat."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Prepared data of a run, on disk and in memory."""

    tokenizer: Tokenizer
    train: dict[TokenStore, float]
    """Stores and their weights."""
    validation: TokenStore | None


class Corpus:
    """Text for training and validation.

    Args:
        train: Whatever `as_source` takes.
        validation: The same, or the fraction of the documents of ``train`` to hold out; 0 for none.
        tokenizer: A tokenizer, or a part that makes one; ``None`` for that of the checkpoint from which the model
            starts, or else a new `TrainBPE`.
        loading: Cache folder and number of tokenizing processes.
        special_tokens: Further special tokens of a tokenizer that is trained because none is given.

    Raises:
        ConfigurationError: If the fraction is not between 0 and 1.
        DataError: If one of the sources is no text source.
    """

    def __init__(
        self,
        train: Any,
        validation: Any,
        tokenizer: TokenizerPart | Tokenizer | None,
        loading: Loading,
        special_tokens: tuple[str, ...] = (),
    ) -> None:
        self._train, self._validation = _sides(as_source(train), validation)
        self._given = tokenizer
        usual = _DEFAULT_TOKENIZER.special_tokens
        self._default = dataclasses.replace(_DEFAULT_TOKENIZER, special_tokens=(*usual, *special_tokens))
        self.tokenizer = None if isinstance(tokenizer, TokenizerPart) else tokenizer
        self._loading = loading
        self._prepared: Prepared | None = None

    def validation_texts(self) -> Iterator[str]:
        """Yield the documents for validation; those that came as token ids decoded."""
        if self._validation is None:
            return iter(())
        tokenizer = self.tokenizer
        documents = None if tokenizer is None else self._validation.token_documents(tokenizer.eos_id)
        if documents is None or tokenizer is None:
            return self._validation.documents()
        return (tokenizer.decode(ids) for ids in documents)

    def prepare(self, *, show_progress: bool, trainer: Trainer | None = None) -> Prepared:
        """Train or load the tokenizer and tokenize, or find both in the cache; a second call returns the same.

        Args:
            show_progress: Draw progress bars.
            trainer: Has the module whose checkpoint has a tokenizer.
        """
        if self._prepared is None:
            self._prepared = self._prepare(show_progress, trainer)
        return self._prepared

    def _prepare(self, show_progress: bool, trainer: Trainer | None) -> Prepared:
        cache = cache_folder(self._loading.cache_dir)
        if self.tokenizer is None:
            chosen = choose_tokenizer(self._given, trainer, self._default)
            part = chosen if isinstance(chosen, TokenizerPart) else None
            self.tokenizer = self._build_tokenizer(part, cache / "tokenizers") if part else cast(Tokenizer, chosen)
        parts = self._train.sources if isinstance(self._train, Mixture) else (self._train,)
        weights = (isinstance(self._train, Mixture) and self._train.weights) or (1.0,) * len(parts)
        stores = [self._store(part, cache, show_progress) for part in parts]
        validation = None if self._validation is None else self._store(self._validation, cache, show_progress)
        return Prepared(self.tokenizer, dict(zip(stores, weights, strict=True)), validation)

    def _build_tokenizer(self, part: TokenizerPart, cache: Path) -> Tokenizer:
        """Make the tokenizer, or find it by the fingerprint of the text: reading all of the text takes longer."""
        if not isinstance(part, TrainedTokenizerPart):
            return part.build(self._train.documents, cache)
        how = json.dumps([__version__, part.to_dict(), _fingerprint_of(self._train)])
        folder = cache / hashlib.sha256(how.encode()).hexdigest()[:32]
        with locked(cache):
            if folder.is_dir():
                with contextlib.suppress(TokenizerError, CheckpointError):  # damaged: trained again
                    return load_tokenizer(folder)
            tokenizer = part.build(self._train.documents, cache)
            tokenizer.save(folder)
            return tokenizer

    def _store(self, source: Source, cache: Path, show_progress: bool) -> TokenStore:
        assert self.tokenizer is not None
        name = hashlib.sha256(f"{_fingerprint_of(source)}:{self.tokenizer.fingerprint}".encode()).hexdigest()[:32]
        stopped = (cache / "tokens").glob("*.partial")
        remove_abandoned(path for path in stopped if path.name != f"{name}.partial")
        return tokenize(
            source,
            self.tokenizer,
            cache / "tokens" / name,
            num_workers=self._loading.tokenize_workers,
            show_progress=show_progress,
            overwrite=True,
        )


def _fingerprint_of(source: Source) -> str:
    if source.fingerprint is None:
        raise DataError(
            "The text can be read only once, but it is needed again by the tokenizer, by validation and by the "
            "next run. Pass a list, a path, or the function that makes the generator, instead of the generator."
        )
    return source.fingerprint


def _sides(source: Source, validation: Any) -> tuple[Source, Source | None]:
    if not isinstance(validation, int | float):
        return source, as_source(validation)
    if not validation:
        return source, None
    if not isinstance(source, Mixture):
        return hold_out(source, validation)
    sides = [hold_out(part, validation) for part in source.sources]
    train = dataclasses.replace(source, sources=tuple(side[0] for side in sides))
    return train, Mixture(sources=tuple(side[1] for side in sides))


def make_tokenizer(
    given: TokenizerPart | Tokenizer | None, texts: Callable[[], Iterable[str]], cache: Path, trainer: Trainer | None
) -> Tokenizer:
    """Return the tokenizer of a run.

    Args:
        given: The tokenizer, how to get it, or None for that of the checkpoint from which the model starts.
        texts: Training texts, for a tokenizer that is to be trained.
        cache: Folder that keeps a trained tokenizer.
        trainer: Trainer of the module.

    Raises:
        ConfigurationError: If there is none, or a new one would be trained for a model that has its own.
        CheckpointError: If there is no such checkpoint.
    """
    chosen = choose_tokenizer(given, trainer)
    return chosen.build(texts, cache) if isinstance(chosen, TokenizerPart) else chosen


def choose_tokenizer(
    given: TokenizerPart | Tokenizer | None, trainer: Trainer | None, default: TokenizerPart | None = None
) -> TokenizerPart | Tokenizer:
    """Return the tokenizer of a run, or how to get it: the checkpoint's own unless another one is given.

    Args:
        given: As in `make_tokenizer`.
        trainer: Trainer of the module.
        default: Tokenizer to build if the model starts from no checkpoint.

    Raises:
        ConfigurationError: If there is none, or a new one would be trained for a model that has its own.
        CheckpointError: If there is no such checkpoint.
    """
    checkpoint = _checkpoint(trainer)
    if given is None and checkpoint is not None:
        tokenizer = load_tokenizer(checkpoint)
        new_tokens = getattr(getattr(_module(trainer), "model_config", None), "new_tokens", ())
        return tokenizer.with_special_tokens(new_tokens)
    if isinstance(given, TrainedTokenizerPart) and checkpoint is not None and _has_tokenizer(checkpoint):
        raise ConfigurationError(
            f"{type(given).__name__} would train a new tokenizer, and the model of {checkpoint} was trained on the "
            "ids of "
            "its own. Use that: --data.tokenizer null. If another one is meant, train it first (lightning-lm tokenizer "
            "train) and name it: --data.tokenizer LoadTokenizer --data.tokenizer.path FOLDER."
        )
    chosen = default if given is None else given
    if chosen is None:
        raise ConfigurationError(
            "The data module has no tokenizer, and the model starts from no checkpoint that has one. Set tokenizer, "
            "for instance to TrainBPE() or LoadTokenizer(path=...)."
        )
    return chosen


def _checkpoint(trainer: Trainer | None) -> Path | None:
    """Return the checkpoint from which the model of a run starts, if it does and a tokenizer may lie there."""
    module = _module(trainer)
    named = getattr(getattr(module, "model_config", None), "checkpoint", None)
    if named is not None:
        named = resolve_checkpoint(named)
        bare = is_adapter_folder(named) and not _has_tokenizer(Path(named))
        return adapter_base(named, getattr(module.model_config, "base", None)) if bare else Path(named)
    # A model that transformers has loaded remembers its folder.
    known = getattr(getattr(_model_of(module), "config", None), "_name_or_path", None)
    return Path(known) if known and Path(known).is_dir() and _has_tokenizer(Path(known)) else None


def _module(trainer: Trainer | None) -> Any:
    return None if trainer is None else trainer.lightning_module


def _model_of(module: Any) -> Any:
    model = getattr(module, "model", None)
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "save_pretrained") else model


def _has_tokenizer(checkpoint: Path) -> bool:
    try:
        load_tokenizer(checkpoint)
    except TokenizerError:
        return False
    return True

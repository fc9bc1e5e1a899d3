"""Choice of a run's tokenizer."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_lm.errors import CheckpointError, ConfigurationError, TokenizerError
from lightning_lm.models.huggingface.peft_adapters import adapter_base, is_adapter_folder
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import resolve_checkpoint
from lightning_lm.tokenizers import TokenizerPart, TrainedTokenizerPart, load_tokenizer

__all__ = ["choose_tokenizer", "make_tokenizer"]


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
        ConfigurationError: If nothing says which it is, or a new one would be trained for a model that has its own.
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
        ConfigurationError: If nothing says which it is, or a new one would be trained for a model that has its own.
        CheckpointError: If there is no such checkpoint.
    """
    checkpoint = _checkpoint(trainer)
    if given is None and checkpoint is not None:
        tokenizer = load_tokenizer(checkpoint)
        new_tokens = getattr(getattr(_module(trainer), "model_config", None), "new_tokens", ())
        return tokenizer.with_special_tokens(new_tokens)
    if isinstance(given, TrainedTokenizerPart) and checkpoint is not None and _has_tokenizer(checkpoint):
        raise ConfigurationError(
            f"{type(given).__name__} would train a new tokenizer, and the model of {checkpoint} has learned the ids of "
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
        if not Path(named).exists() and Path(named).parts[0] != "runs":
            raise CheckpointError(
                f"There is no checkpoint at {named} (looked from {Path.cwd()}). Run the recipe that trains it first; a "
                f"model of the Hub must be downloaded: hf download {named} --local-dir FOLDER."
            )
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

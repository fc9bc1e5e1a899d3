"""Where the tokenizer of a run comes from."""

from collections.abc import Callable, Iterable
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_lm.errors import ConfigurationError
from lightning_lm.protocols import Tokenizer
from lightning_lm.tokenizers import TokenizerPart, load_tokenizer

__all__ = ["make_tokenizer"]


def make_tokenizer(
    given: TokenizerPart | Tokenizer | None, texts: Callable[[], Iterable[str]], cache: Path, trainer: Trainer | None
) -> Tokenizer:
    """Return the tokenizer of a run.

    Args:
        given: The tokenizer, how to get it, or None for that of the checkpoint from which the model starts.
        texts: What it is trained on, where it is to be trained.
        cache: Where one that was trained is kept.
        trainer: Knows the module.

    Raises:
        ConfigurationError: If nothing says which it is.
    """
    if isinstance(given, TokenizerPart):
        return given.build(texts, cache)
    if given is not None:
        return given
    module = None if trainer is None else trainer.lightning_module
    checkpoint = getattr(getattr(module, "model_config", None), "checkpoint", None)
    if checkpoint is None:
        raise ConfigurationError(
            "The data module has no tokenizer, and the model starts from no checkpoint that has one. Set tokenizer, "
            "for instance to TrainBPE() or LoadTokenizer(path=...)."
        )
    return load_tokenizer(checkpoint)

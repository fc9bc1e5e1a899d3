"""Base class of the configurations of models."""

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Limit, Part

__all__ = ["ModelConfig", "with_vocabulary"]

Config = TypeVar("Config", bound="ModelConfig")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Part, limits={"vocab_size": Limit.COUNT, "context_length": Limit.NON_NEGATIVE}):
    """Base of the models that a config can name.

    Args:
        vocab_size: Number of token ids; ``None`` to take it from the tokenizer.
        context_length: Tokens of a training row, and how far generation goes unless told otherwise.
    """

    vocab_size: int | None = None
    context_length: int = 1024

    def build(self, vocab_size: int | None = None) -> nn.Module:
        """Return the model.

        Args:
            vocab_size: That of the tokenizer, for a config that leaves its own out.
        """
        raise NotImplementedError


def with_vocabulary(config: Config, vocab_size: int | None) -> Config:
    """Return a config with the size of its vocabulary.

    Args:
        config: Config of a model.
        vocab_size: That of the tokenizer, for a config that leaves its own out.

    Raises:
        ConfigurationError: If neither says how large the vocabulary is, or the config's is too small.
    """
    size = config.vocab_size or vocab_size
    if size is None:
        raise ConfigurationError("vocab_size is not known. Set it in the config, or pass the tokenizer's.")
    if vocab_size is not None and size < vocab_size:
        raise ConfigurationError(
            f"The config has vocab_size={size}, but the tokenizer has {vocab_size} ids. Leave it out, or set at "
            f"least {vocab_size}."
        )
    return dataclasses.replace(config, vocab_size=size)

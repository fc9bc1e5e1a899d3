"""Base class of the configurations of models."""

from dataclasses import dataclass

from torch import nn

from lightning_lm.parts import Limit, Part

__all__ = ["ModelConfig"]


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

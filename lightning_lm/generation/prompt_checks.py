"""Checks of prompts: ids that the model has, and lengths that its positions reach."""

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.positions import PositionTable
from lightning_lm.protocols import Tokenizer

__all__ = ["check_ids", "check_length", "room_for", "spare_positions", "stated_context_length"]


def check_ids(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts with ids that the model has no embedding for.

    Args:
        model: Anything that generates; one without a ``head`` passes.
        prompts: Token ids, at least one in each.

    Raises:
        ConfigurationError: If an id is negative or too large.
    """
    weight = getattr(getattr(model, "head", None), "weight", None)
    for index, prompt in enumerate(prompts):
        low, high = min(prompt), max(prompt)
        if low < 0 or (weight is not None and high >= weight.shape[0]):
            known = "" if weight is None else f"; the model has 0 to {weight.shape[0] - 1}"
            raise ConfigurationError(
                f"Prompt {index} contains the id {low if low < 0 else high}{known}. Use the tokenizer that it was "
                "trained with."
            )


def check_length(model: Any, prompt_length: int, max_new_tokens: int) -> None:
    """Refuse a text longer than the learned positions, and warn of one longer than the training context.

    Rotary and sinusoidal positions have no limit, but quality usually degrades beyond the training length.

    Args:
        model: Any model that generates; one without a stated length is not checked.
        prompt_length: Tokens of the longest prompt.
        max_new_tokens: Most tokens after it. The last of them is never read, so it needs no position.

    Raises:
        ConfigurationError: If the positions are learned and there are too few.
    """
    needed = prompt_length + max_new_tokens - 1
    limit, learned = stated_context_length(model)
    if limit is None or needed <= limit:
        return
    message = (
        f"The longest prompt has {prompt_length} tokens and max_new_tokens={max_new_tokens}, which needs {needed} "
        f"positions; the model was made for context_length={limit}"
    )
    if learned:
        raise ConfigurationError(
            f"{message} and its learned positions end there. Shorten the prompt, or set max_new_tokens to at most "
            f"{max(limit - prompt_length + 1, 0)}."
        )
    warnings.warn(
        f"{message}. Its positions have no limit, but quality usually degrades beyond that length.", stacklevel=3
    )


def room_for(model: Any, tokenizer: Tokenizer, prompts: Iterable[str | Sequence[int]], at_most: int) -> int:
    """Return how many tokens fit after the longest prompt into the length that a model was made for: 1 or more.

    Args:
        model: Any model that generates.
        tokenizer: That of the model.
        prompts: Texts or token ids.
        at_most: Returned if there is room for so many, or if the model has no stated length.
    """
    limit, _ = stated_context_length(model)
    lengths = [len(tokenizer.encode(text)) + 1 if isinstance(text, str) else len(text) for text in prompts]
    return at_most if limit is None else max(1, min(at_most, limit - max(lengths, default=0) + 1))


def spare_positions(model: Any, length: int) -> int:
    """Return how many tokens a model can certainly read after a text; zero if it tells nothing of its length.

    Args:
        model: Anything that generates.
        length: Tokens of the text.
    """
    limit, learned = stated_context_length(model)
    if limit is None:
        return 0
    return max(limit - length, 0) if learned else sys.maxsize


def stated_context_length(model: Any) -> tuple[int | None, bool]:
    """Return the context length of a model, if it states one, and whether its positions are learned.

    Args:
        model: Any model.
    """
    if not isinstance(model, nn.Module):
        return None, False
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, PositionTable)]
    if tables:
        return min(tables), True
    config = getattr(model, "config", None) or getattr(getattr(model, "model", None), "config", None)
    limit = getattr(config, "context_length", None)
    if limit is not None:
        return int(limit), False
    limit = getattr(config, "max_position_embeddings", None)  # transformers
    rotary = any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta"))
    return (None if limit is None else int(limit)), not rotary

"""Prefix sharing: completions of one prompt share its keys and values, which are computed once."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lm.models.attention import SelfAttention
from lightning_lm.models.ffn import FeedForward, GatedFeedForward
from lightning_lm.models.transformer import Block, Transformer

__all__ = ["completion_hidden_states"]

WORTH = 0.8
"""Fraction of all rows' tokens above which computing prompts once saves too little."""


def completion_hidden_states(model: nn.Module, batch: Mapping[str, Tensor], mask: Tensor) -> Tensor | None:
    """Return the hidden states that predict each target token, row after row, [targets, d_model]; or ``None``.

    They and their gradients equal those of computing every row whole, up to the order of sums: a prompt's hidden states
    depend on no completion, and each completion sees the same keys and values. ``None`` if that does not hold or saves
    little: for a model that is not made of `SelfAttention` and plain feed-forwards, has swapped layers or active
    dropout, and on an accelerator, whose fused attention has no such form.

    Args:
        model: The policy.
        batch: A `types.ExperienceBatch`.
        mask: Positions that predict a target token, bool [rows, seq - 1].
    """
    shared = "prompt_numbers" in batch and batch["input_ids"].device.type == "cpu"
    if not shared or not _reads_tokens_one_by_one(model):
        return None
    assert isinstance(model, Transformer)
    starts = batch["prompt_lengths"]
    numbers, prompt_of = batch["prompt_numbers"].unique(return_inverse=True)
    columns = torch.arange(mask.shape[1], device=starts.device)
    width, shortest = int(starts.max()), int(starts.min())
    longest = int((mask * (columns + 2 - starts[:, None])).max())  # predictions of the longest completion
    rows, seq = mask.shape
    if not longest or len(numbers) * width + rows * (longest - 1) > WORTH * rows * seq:
        return None
    first = torch.zeros_like(numbers).scatter_(0, prompt_of, torch.arange(rows, device=starts.device))
    padding = width - starts[first]
    prompts = _taken(batch["input_ids"][first], -padding, width)
    cache = model.make_cache(len(numbers), width + longest - 1, starts=padding if shortest < width else None)
    hidden = model.hidden(prompts, cache=cache)[:, -1:][prompt_of]
    if longest > 1:
        cache.select(prompt_of)
        completions = model.hidden(_taken(batch["input_ids"], starts, longest - 1), cache=cache)
        hidden = torch.cat((hidden, completions), dim=1)
    within = torch.arange(longest, device=starts.device) < (seq - starts + 1)[:, None]
    return hidden[_taken(mask, starts - 1, longest) & within]


def _taken(values: Tensor, first: Tensor, width: int) -> Tensor:
    """Return ``width`` columns of each row from its own first one on; those outside of the row repeat its ends."""
    columns = first[:, None] + torch.arange(width, device=values.device)
    return values.gather(1, columns.clamp(0, values.shape[1] - 1))


def _reads_tokens_one_by_one(model: nn.Module) -> bool:
    """Return whether a token's hidden state depends on earlier tokens only, each of which a cache can store."""
    return (
        type(model) is Transformer
        and not model.training
        and all(
            type(block) is Block
            and type(block.mixer) is SelfAttention
            and (block.ffn is None or type(block.ffn) in (FeedForward, GatedFeedForward))
            for block in model.layers
        )
    )

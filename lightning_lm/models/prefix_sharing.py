"""Features of completions whose prompts are read once: all completions to a prompt share its keys and values."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lm.models.attention import SelfAttention
from lightning_lm.models.ffn import FeedForward, GatedFeedForward
from lightning_lm.models.transformer import Block, Transformer

__all__ = ["answer_features"]

WORTH = 0.8
"""Share of the tokens of all rows above which reading prompts once saves too little."""


def answer_features(model: nn.Module, batch: Mapping[str, Tensor], learned: Tensor) -> Tensor | None:
    """Return the features from which each learned token is predicted, row after row, [learned, d_model].

    They and their gradients are those of reading every row whole, up to the order of sums: a prompt's features depend
    on no completion, and each completion sees the same keys and values. `None` if that is not so, or saves little: a
    model that is not made of `SelfAttention` and plain feed-forwards, has its layers exchanged or may drop
    activations, a batch that does not say where its prompts end, and an accelerator, whose fused attention has no such
    form.

    Args:
        model: The policy.
        batch: A `types.ExperienceBatch`.
        learned: Mask of the positions that predict a target token, bool [rows, seq - 1].
    """
    shared = "prompt_numbers" in batch and batch["input_ids"].device.type == "cpu"
    if not shared or not _reads_tokens_one_by_one(model):
        return None
    assert isinstance(model, Transformer)
    starts = batch["prompt_lengths"]
    numbers, prompt_of = batch["prompt_numbers"].unique(return_inverse=True)
    columns = torch.arange(learned.shape[1], device=starts.device)
    width, shortest = int(starts.max()), int(starts.min())
    answer = int((learned * (columns + 2 - starts[:, None])).max())  # predictions of the longest one
    rows, seq = learned.shape
    if not answer or len(numbers) * width + rows * (answer - 1) > WORTH * rows * seq:
        return None
    first = torch.zeros_like(numbers).scatter_(0, prompt_of, torch.arange(rows, device=starts.device))
    padding = width - starts[first]
    prompts = _taken(batch["input_ids"][first], -padding, width)
    cache = model.make_cache(len(numbers), width + answer - 1, starts=padding if shortest < width else None)
    features = model.hidden(prompts, cache=cache)[:, -1:][prompt_of]
    if answer > 1:
        cache.select(prompt_of)
        answers = model.hidden(_taken(batch["input_ids"], starts, answer - 1), cache=cache)
        features = torch.cat((features, answers), dim=1)
    within = torch.arange(answer, device=starts.device) < (seq - starts + 1)[:, None]
    return features[_taken(learned, starts - 1, answer) & within]


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

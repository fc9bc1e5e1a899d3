"""Texts as sources of an encoder-decoder: encoded as in training, padded, and read once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation.generator import any_mark, begin_mark, evaluating
from lightning_lm.protocols import Tokenizer

__all__ = ["padded_sources", "read_sources", "source_ids", "target_begin"]


@torch.no_grad()
def read_sources(
    model: Any, tokenizer: Tokenizer, sources: Sequence[str | Sequence[int]]
) -> tuple[Any, list[list[int]]]:
    """Return the language model of the targets of these sources, and a prompt for each: the begin token.

    Give both to `Generator` or `beam_search` (after ``model.eval()``). Sources of different lengths are read together.

    Args:
        model: An encoder-decoder, with ``given``.
        tokenizer: Tokenizer of the model.
        sources: Texts, or token ids, which are taken as they are.

    Raises:
        ConfigurationError: If there is no source, or one is longer than the encoder reads.

    Example:
        >>> from lightning_lm.generation import Generator, Sampling, read_sources
        >>> from lightning_lm.models import Attention, CrossAttention, EncoderDecoderConfig, Layer, TransformerConfig
        >>> from lightning_lm.models import decoder_layers
        >>> from lightning_lm.tokenizers import ByteTokenizer
        >>> pair = decoder_layers(attention=Attention(num_heads=2), cross=CrossAttention(num_heads=2))
        >>> both = Layer(mixer=Attention(num_heads=2, causal=False))
        >>> encoder = TransformerConfig(d_model=8, num_layers=1, layers=both)
        >>> decoder = TransformerConfig(d_model=8, num_layers=2, layers=pair)
        >>> model = EncoderDecoderConfig(encoder=encoder, decoder=decoder, context_length=32).build(260)
        >>> writer, prompts = read_sources(model, ByteTokenizer(), ["a long text", "another"])
        >>> generator = Generator(writer, ByteTokenizer())
        >>> written = generator.generate(prompts, sampling=Sampling(temperature=0), max_new_tokens=8)
        >>> len(written)
        2
    """
    rows = [source_ids(text, tokenizer) if isinstance(text, str) else list(text) for text in sources]
    if not rows or not all(rows):
        raise ConfigurationError("An encoder-decoder writes to sources; give at least one, with at least one token.")
    longest, limit = max(map(len, rows)), model.config.context_length
    if longest > limit:
        raise ConfigurationError(
            f"Source {[len(row) for row in rows].index(longest)} has {longest} tokens, and the encoder reads "
            f"context_length={limit}. Shorten it."
        )
    device = model.head.weight.device
    with evaluating(model):
        writer = model.given(*(part.to(device) for part in padded_sources(rows)))
    return writer, [[target_begin(tokenizer)] for _ in rows]


def source_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a source as in training: those of the text, then the end of text.

    Args:
        text: The source; special tokens in it, such as ``<extra_id_0>``, count as such.
        tokenizer: Tokenizer of the model.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [*tokenizer.encode(text, allow_special=True), *end]


def padded_sources(sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return sources padded on the right, and their document ids: 1 for the padding.

    Args:
        sources: Ids of each source.
    """
    width = max(1, *map(len, sources))
    ids, documents = (torch.full((len(sources), width), fill) for fill in (0, 1))
    for row, source in enumerate(sources):
        ids[row, : len(source)] = torch.tensor(source, dtype=torch.int64)
        documents[row, : len(source)] = 0
    return ids, documents


def target_begin(tokenizer: Tokenizer) -> int:
    """Return the id before a target: the padding of a tokenizer that names one and no begin (T5), else the begin.

    Args:
        tokenizer: Tokenizer of the model.
    """
    named = getattr(tokenizer, "named_tokens", {})
    if getattr(tokenizer, "bos_id", None) is None and "pad_token" in named:
        return tokenizer.special_tokens[named["pad_token"]]
    return (begin_mark(tokenizer) or any_mark(tokenizer) or [0])[-1]

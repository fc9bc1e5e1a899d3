"""Growing the vocabulary of a trained model: rows for tokens that its tokenizer did not have.

A new row of the embedding, and of the output layer, is the mean of the old ones. A random one may give the new token
more probability than all others together; with the mean the distribution over the old tokens hardly moves.

Source:
    Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.huggingface.transformers_model import TransformersModel
from lightning_lm.models.roles import with_role
from lightning_lm.models.transformer import Transformer

__all__ = ["grow_vocabulary", "trains_vocabulary"]


def grow_vocabulary(model: nn.Module, vocab_size: int) -> None:
    """Give a model rows for further token ids, in place; a tied output layer stays tied.

    Args:
        model: A `Transformer`, or a causal language model of ``transformers``, without adapters.
        vocab_size: Number of ids afterwards; a model that has as many or more stays as it is.

    Raises:
        ConfigurationError: If the model has adapters, or is of another kind.
    """
    if any(hasattr(part, "peft_config") for part in (model, getattr(model, "model", None))):
        raise ConfigurationError(
            "The model has adapters, which were made for its old vocabulary; merge them first: "
            "lightning_lm.callbacks.merge_adapters(model)."
        )
    if isinstance(model, Transformer):
        if vocab_size > model.embed.num_embeddings:
            _grow(model, vocab_size)
        return
    inner: Any = model.model if isinstance(model, TransformersModel) else model
    if not hasattr(inner, "resize_token_embeddings"):
        raise ConfigurationError(f"A {type(inner).__name__} has no vocabulary that can be grown.")
    old = len(inner.get_input_embeddings().weight)
    if vocab_size <= old:
        return
    layers = [inner.get_input_embeddings, inner.get_output_embeddings]
    inner.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        for value in [value for layer in layers for value in layer().parameters()]:
            value[old:] = _mean(value[:old])


def trains_vocabulary(model: nn.Module) -> bool:
    """Tell whether embedding and output layer of a model are both trained, whole or by adapters.

    Args:
        model: As in `grow_vocabulary`, with or without adapters.
    """
    inner: Any = model.model if isinstance(model, TransformersModel) else model
    embedding: Any = inner.embed if isinstance(inner, Transformer) else inner.get_input_embeddings()
    head: Any = model.head
    return all(any(value.requires_grad for value in layer.parameters()) for layer in (embedding, head))


@torch.no_grad()
def _grow(model: Transformer, vocab_size: int) -> None:
    tied = model.config.tie_embeddings
    embed, head = model.embed, model.head
    model.embed = with_role(
        nn.Embedding(vocab_size, embed.embedding_dim, _weight=_grown(embed, vocab_size)), "embedding"
    )
    if tied:
        head.weight = model.embed.weight
    else:
        head.weight = nn.Parameter(_grown(head, vocab_size), requires_grad=head.weight.requires_grad)
    head.out_features = vocab_size
    model.embed.weight.requires_grad_(embed.weight.requires_grad)
    model.config = dataclasses.replace(model.config, vocab_size=vocab_size)


def _grown(layer: Any, rows: int) -> Tensor:
    weight: Tensor = layer.weight.detach()
    return torch.cat([weight, _mean(weight).expand(rows - len(weight), -1)])


def _mean(rows: Tensor) -> Tensor:
    return rows.double().mean(0).to(rows.dtype)

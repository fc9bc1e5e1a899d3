"""A user's own model: it gets the inputs that its forward takes, and what is lost in packed rows is said."""

import inspect
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.encoder_decoder import ConditionedDecoder
from lightning_lm.models.huggingface.transformers_model import TransformersModel, is_of_transformers, unsupported
from lightning_lm.models.mixer import MixerModule
from lightning_lm.models.packing_trial import ONE_PER_ROW, keeps_documents_apart, several_documents
from lightning_lm.models.transformer import Transformer
from lightning_lm.protocols import is_language_model

__all__ = ["accepted_inputs", "hidden_or_whole_logits", "mixed_documents", "whole_logits", "with_counted"]

_TRIED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of users that were given packed rows."""


def hidden_or_whole_logits(
    model: Any, inputs: Mapping[str, Tensor], wanted: Bool[Tensor, "batch seq"] | None = None
) -> Float[Tensor, "batch seq width"]:
    """Return the hidden states of all positions; the logits of a model that has no `hidden` and `head`.

    Args:
        model: Causal language model.
        inputs: ``input_ids``, and what else the model may take.
        wanted: Mask of the positions whose outputs are used, where that matters to the model; see `with_counted`.
    """
    inputs = inputs if wanted is None else with_counted(model, inputs, wanted)
    if not is_language_model(model):
        return whole_logits(model, inputs)
    hidden: Tensor = model.hidden(**accepted_inputs(model, inputs))
    return hidden


def whole_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch seq vocab"]:
    """Return the logits of a model that has no `hidden` and `head`.

    Args:
        model: Returns logits, an object that has them as ``logits``, or a tuple that begins with them.
        inputs: ``input_ids``, and what else its forward may take: ``position_ids``, ``document_ids``.

    Raises:
        ConfigurationError: If rows of several documents are given to a bare model of ``transformers``, which would
            ignore the borders between them; or if the logits are not those of every token.
    """
    ids, documents = inputs["input_ids"], inputs.get("document_ids")
    if documents is not None and is_of_transformers(model):
        if several_documents(ids, documents):
            raise ConfigurationError(
                f"The rows hold packed documents, and {type(model).__name__} cannot be told to keep them apart: it "
                f"{unsupported(model)} {ONE_PER_ROW}"
            )
        inputs = {name: value for name, value in inputs.items() if name != "document_ids"}
    given = accepted_inputs(model, inputs)
    output = model(**given) if _takes_keyword(model, "input_ids") else model(given.pop("input_ids"), **given)
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    if is_of_transformers(model):
        logits = logits[:, -ids.shape[1] :]  # learned prompts of peft stand before the row
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigurationError(
            f"{type(model).__name__}.forward returned {found} for input_ids of shape {tuple(ids.shape)}; return the "
            "logits of every token, [batch, seq, vocab]."
        )
    return logits


def with_counted(
    model: nn.Module, inputs: Mapping[str, Tensor], wanted: Bool[Tensor, "batch seq"]
) -> dict[str, Tensor]:
    """Return inputs that say which tokens count for the loads of experts, if the model has any.

    Those are the tokens that a wanted position depends on: the others are padding.

    Args:
        model: Language model; if it reads in both directions, a wanted position depends on its whole document.
        inputs: ``input_ids``, and what else the model may take.
        wanted: Mask of the positions whose outputs are used.
    """
    if not any(getattr(module, "takes_context", False) for module in model.modules()):
        return dict(inputs)
    return {**inputs, **_counted(model, inputs, wanted)}


def _counted(model: nn.Module, inputs: Mapping[str, Tensor], wanted: Tensor) -> dict[str, Tensor]:
    if not _takes_keyword(model, "counted"):
        return {}
    documents = inputs.get("document_ids", torch.zeros_like(wanted, dtype=torch.int64))
    counted = _precede(wanted, documents)
    if not getattr(model, "is_causal", True):
        counted |= _precede(wanted.flip(1), documents.flip(1)).flip(1)
    return {"counted": counted}


def _precede(wanted: Tensor, documents: Tensor) -> Tensor:
    """Return a mask of the tokens at or after which a wanted position stands in the same document."""
    columns = torch.arange(wanted.size(1), device=wanted.device).expand_as(wanted)
    later = torch.where(wanted, columns, wanted.size(1) - 1).flip(1).cummin(1).values.flip(1)
    return wanted.gather(1, later) & (documents.gather(1, later) == documents)


def accepted_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``input_ids`` and those of the other inputs that the forward of a model takes.

    Warns at the first packed rows that a user's own model is given, if it does not keep their documents apart.

    Args:
        model: Any; one with `hidden` and `head` is asked for what `hidden` takes.
        inputs: ``input_ids``, ``position_ids``, ``document_ids``.
    """
    if "prefix_lengths" in inputs and not _reads_prefixes(model):
        raise ConfigurationError(
            f"The batch has prefix_lengths, and {type(model).__name__} does not take them, or no layer of it attends: "
            "it would read prefixes causally. Train a model of lightning_lm.models with layers of attention."
        )
    if isinstance(model, Transformer | TransformersModel | ConditionedDecoder):
        return dict(inputs)
    ids, documents = inputs["input_ids"], inputs.get("document_ids")
    if documents is not None and model not in _TRIED and several_documents(ids, documents):
        how = mixed_documents(model, inputs)
        if how is not None:
            warnings.warn(
                f"The rows hold packed documents, and {type(model).__name__} {how}. {ONE_PER_ROW}", stacklevel=2
            )
    return {name: value for name, value in inputs.items() if name == "input_ids" or _takes_keyword(model, name)}


def _reads_prefixes(model: nn.Module) -> bool:
    """Return whether tokens of a prefix see later ones; a recurrent layer passes over what it is told of them."""
    mixers = [module for module in model.modules() if isinstance(module, MixerModule)]
    attends = not mixers or any(mixer.attention_shape is not None for mixer in mixers)
    return attends and _takes_keyword(model, "prefix_lengths")


def mixed_documents(model: nn.Module, inputs: Mapping[str, Tensor]) -> str | None:
    """Return how a user's own model mixes the documents of packed rows; ``None`` if it keeps them apart.

    Args:
        model: Not of ``transformers``: those are tried by `TransformersModel`.
        inputs: Rows of several documents.
    """
    _TRIED.add(model)
    lost = [name for name in ("document_ids", "position_ids") if not _takes_keyword(model, name)]
    if "document_ids" in lost:
        return f"does not take {' and '.join(lost)}, so tokens see the earlier documents of their row"

    def run(inputs: dict[str, Tensor]) -> Tensor:
        given = accepted_inputs(model, inputs)
        hidden: Tensor = model.hidden(**given) if is_language_model(model) else whole_logits(model, inputs)
        return hidden

    ids = inputs["input_ids"]
    apart = keeps_documents_apart(model, run, num_ids=int(ids.max()) + 1, device=ids.device)
    return None if apart else "takes document_ids, but a document after another gets other logits than alone"


def _takes_keyword(model: nn.Module, name: str) -> bool:
    """Return whether a model's `hidden`, or its forward if it has none, takes an argument by this name."""
    inner: Any = getattr(model, "_orig_mod", model)  # the wrapper of torch.compile takes anything
    function = inner.hidden if is_language_model(inner) else inner.forward
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.name == name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL):
        return True
    # Where ids have another name they are the first argument, whatever else may be given by name.
    by_place = any(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) for parameter in parameters
    )
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return any_name and not (name == "input_ids" and by_place)

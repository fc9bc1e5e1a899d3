"""The generation settings of a published model (``generation_config.json``): end ids, BOS, PAD, sampling defaults.

A model carries them from the folder it was read from to the checkpoints of its training and the folder it is exported
to. They are plain data under the names of ``transformers``, so that none of this needs it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.huggingface.weights import read_json

__all__ = [
    "add_end_ids",
    "end_ids",
    "exported_settings",
    "generation_settings",
    "prompt_is_prefix",
    "read_generation_settings",
    "set_generation_settings",
    "set_prompt_is_prefix",
]

FILE = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ATTRIBUTE = "generation_settings"
_PREFIX = "prompt_is_prefix"
"""Our own setting: tokens of a prompt see each other in both directions."""
_GUESSED = "_from_model_config"
"""Marks ids that nobody chose for generation: they were taken from the configuration of the model."""


def read_generation_settings(folder: Path | str) -> dict[str, Any]:
    """Return the settings in a folder: its ``generation_config.json``, or else the ids in its ``config.json``.

    Args:
        folder: A model in the format of Hugging Face.
    """
    path = Path(folder) / FILE
    if path.is_file():
        return read_json(path)
    config = read_json(path.with_name("config.json"))
    known = {name: config[name] for name in _IDS if config.get(name) is not None}
    return {**known, _GUESSED: True} if known else {}


def generation_settings(model: Any) -> dict[str, Any]:
    """Return the settings that a model carries; empty if it has none.

    Args:
        model: Model of this package or of ``transformers``, bare, in a `TransformersModel` or with adapters.
    """
    bare = _bare(model)
    config = getattr(bare, "generation_config", None)
    if config is not None:
        settings = dict(json.loads(config.to_json_string(use_diff=True)))
        if any(settings.get(name) != getattr(bare.config, name, None) for name in _IDS):
            settings.pop(_GUESSED, None)  # somebody chose them since
        return settings
    return dict(getattr(model, _ATTRIBUTE, None) or {})


def set_generation_settings(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Let a model carry settings.

    Args:
        model: As in `generation_settings`.
        settings: Names and values of a ``generation_config.json``.
    """
    config = getattr(_bare(model), "generation_config", None)
    if config is not None:
        for name, value in {**dict.fromkeys(_IDS), _GUESSED: False, **settings}.items():
            setattr(config, name, value)  # in place: the object may be a user's
    else:
        setattr(model, _ATTRIBUTE, dict(settings))


def end_ids(settings: Mapping[str, Any], tokenizer: Any = None) -> tuple[int, ...]:
    """Return the ids that end generation.

    Args:
        settings: Names and values of a ``generation_config.json``.
        tokenizer: Tokenizer of the model. Ids that only the configuration of the model names count if they are
            special tokens of it: ``transformers`` gives 2 to every new Llama, whatever that id stands for.
    """
    return tuple(_listed(_trusted(settings, tokenizer).get("eos_token_id")))


def add_end_ids(model: nn.Module, ids: Iterable[int], tokenizer: Any = None) -> None:
    """Let further ids end the generation of a model.

    Args:
        model: As in `generation_settings`.
        ids: Token ids.
        tokenizer: As in `end_ids`.
    """
    settings = generation_settings(model)
    known = end_ids(settings, tokenizer)
    joined = list(dict.fromkeys([*known, *ids]))
    if joined != list(known):
        kept = _trusted(settings, tokenizer)
        kept.pop(_GUESSED, None)
        set_generation_settings(model, {**kept, "eos_token_id": joined[0] if len(joined) == 1 else joined})


def prompt_is_prefix(model: Any) -> bool:
    """Return whether generation reads prompts in both directions, as a prefix language model was trained to.

    Args:
        model: As in `generation_settings`.
    """
    return bool(generation_settings(model).get(_PREFIX, False))


def set_prompt_is_prefix(model: nn.Module, value: bool) -> None:
    """Let generation read prompts in both directions, or causally again.

    Args:
        model: A model whose forward takes ``prefix_lengths``.
        value: True for both directions.
    """
    settings = generation_settings(model)
    settings.pop(_PREFIX, None)
    set_generation_settings(model, {**settings, _PREFIX: True} if value else settings)


def exported_settings(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the content of the ``generation_config.json`` of a model that is exported with its tokenizer.

    Args:
        model: As in `generation_settings`.
        tokenizer: Its end of text ends generation too.

    Raises:
        ConfigurationError: If the model reads prompts in both directions, which no causal model elsewhere does.
    """
    if prompt_is_prefix(model):
        raise ConfigurationError(
            "The model was trained to read prompts in both directions (prefix language modelling), and after an export "
            "it would read them causally. Train it on causally first, or export it all the same after "
            "lightning_lm.models.set_prompt_is_prefix(model, False)."
        )
    settings = _trusted(generation_settings(model), tokenizer)
    ends = list(_listed(settings.get("eos_token_id")))
    if tokenizer is not None and tokenizer.eos_id is not None and tokenizer.eos_id not in ends:
        ends.append(tokenizer.eos_id)
    settings.pop("eos_token_id", None)
    return {**settings, "eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else settings


def _trusted(settings: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return settings without the ids that were guessed and are no special tokens."""
    kept = dict(settings)
    if tokenizer is None or not settings.get(_GUESSED):
        return kept
    special = set(tokenizer.special_tokens.values())
    for name in _IDS:
        ids = [token for token in _listed(kept.pop(name, None)) if token in special]
        if ids:
            kept[name] = ids if len(ids) > 1 else ids[0]
    return kept


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else [int(token) for token in ids] if isinstance(ids, list | tuple) else [int(ids)]


def _bare(model: Any) -> Any:
    """Return the model of ``transformers`` inside its wrappers, or the model itself."""
    if not hasattr(model, "generation_config"):
        inner = getattr(model, "model", None)
        model = inner if hasattr(inner, "generation_config") else model
    return model.get_base_model() if hasattr(model, "get_base_model") else model

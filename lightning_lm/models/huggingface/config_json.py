"""``config.json`` of Hugging Face to `TransformerConfig` and back."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.rope import ntk_base
from lightning_lm.models.attention import Attention
from lightning_lm.models.encoder_decoder import EncoderDecoderConfig
from lightning_lm.models.experts import LoadBias, MoE
from lightning_lm.models.ffn import FFN, GLU, MLP
from lightning_lm.models.huggingface.families import FAMILIES
from lightning_lm.models.huggingface.weights import read_json
from lightning_lm.models.init import Normal
from lightning_lm.models.latent_attention import LatentAttention
from lightning_lm.models.mixer import Mixer
from lightning_lm.models.positions import NTKScaling
from lightning_lm.models.recurrent.mixer import RecurrentPart
from lightning_lm.models.transformer import Layer, TransformerConfig

__all__ = ["config_from_huggingface", "config_to_huggingface"]

OurConfig = TransformerConfig | EncoderDecoderConfig


def config_from_huggingface(source: Mapping[str, Any] | str | Path) -> OurConfig:
    """Return the config that a ``config.json`` describes.

    Args:
        source: A folder with a ``config.json``, or its content.

    Raises:
        ConfigurationError: If the family, or a setting of it, is not known here.
        CheckpointError: If the folder has no readable ``config.json``, or that lacks a setting.
    """
    settings = source if isinstance(source, Mapping) else read_json(Path(source) / "config.json")
    name = settings.get("model_type")
    if name not in FAMILIES:
        near = difflib.get_close_matches(str(name), FAMILIES, n=1)
        nearest = f" The nearest is {near[0]}, which computes something else." if near else ""
        raise ConfigurationError(
            f"The model_type {name!r} is not known here; known are {', '.join(FAMILIES)}.{nearest} Any causal model of "
            "transformers can be used through lightning_lm.models.TransformersModel."
        )
    config: OurConfig = FAMILIES[name].config(settings)
    return config


def config_to_huggingface(config: OurConfig, *, family: str | None = None) -> dict[str, Any]:
    """Return the content of a ``config.json`` that describes the same function.

    Args:
        config: Configuration to describe, without its initialisation, and without dropout if the family has none.
        family: The ``model_type`` to write; ``None`` for the first that can express the config.

    Raises:
        ConfigurationError: If no family can express it; the message says what stands against each.
    """
    if config.vocab_size is None:
        raise ConfigurationError("The config does not know its vocab_size; give that of a built model: model.config.")
    if family is not None and family not in FAMILIES:
        raise ConfigurationError(f"There is no family {family!r}; known are {', '.join(FAMILIES)}.")
    explicit = _explicit(config)
    reasons = []
    for name in FAMILIES if family is None else (family,):
        try:
            return _written(explicit, name)
        except ConfigurationError as error:
            reasons.append(f"{name}: {str(error).rstrip('.')}")
    raise ConfigurationError(f"No family of transformers can express this config. {'; '.join(reasons)}.")


def _written(config: OurConfig, name: str) -> dict[str, Any]:
    """Write a config as a family, and read it back to see that nothing is lost."""
    family = FAMILIES[name]
    if type(config) is not family.describes:
        raise ConfigurationError(f"it describes a {family.describes.__name__}, not a {type(config).__name__}")
    settings = {"architectures": [family.architecture], "model_type": name, **family.write(config)}
    wanted, got = _function(config), _function(family.config(settings))
    if getattr(config, "positions", None) is None:  # then no weight has the context length
        got["context_length"] = wanted["context_length"]
    lost = list(_differences(wanted, got))
    if lost:
        raise ConfigurationError(f"it has no {', '.join(lost[:3])}")
    return settings


def _explicit(config: OurConfig) -> OurConfig:
    """Spell out what a config leaves to defaults."""
    if isinstance(config, EncoderDecoderConfig):
        parts = {name: _explicit(getattr(config, name)) for name in ("encoder", "decoder")}
        return dataclasses.replace(config, **parts)  # type: ignore[arg-type]
    layers = tuple(
        Layer(mixer=_explicit_mixer(layer.mixer, config.d_model), ffn=_explicit_ffn(layer.ffn, config.d_model))
        for layer in config.depth_pattern
    )
    return dataclasses.replace(config, layers=layers)


def _explicit_mixer(mixer: Mixer, d_model: int) -> Mixer:
    if isinstance(mixer, RecurrentPart):
        return mixer.spelt_out(d_model)
    if isinstance(mixer, LatentAttention):
        scale = (mixer.nope_dim + mixer.rope_dim) ** -0.5 if mixer.scale is None else mixer.scale
        return dataclasses.replace(mixer, scale=scale)
    if not isinstance(mixer, Attention):
        return mixer
    head_dim = mixer.head_dim or d_model // mixer.num_heads
    rope = mixer.rope
    if rope is not None and isinstance(rope.scaling, NTKScaling):  # nothing but a larger base
        base = ntk_base(rope.base, rope.rotary_dim(head_dim), rope.scaling.factor)
        rope = dataclasses.replace(rope, base=base, scaling=None)
    return dataclasses.replace(mixer, num_kv_heads=mixer.num_kv_heads or mixer.num_heads, head_dim=head_dim, rope=rope)


def _explicit_ffn(ffn: FFN | None, d_model: int) -> FFN | None:
    if isinstance(ffn, MoE):
        parts = {name: _explicit_ffn(getattr(ffn, name), d_model) for name in ("experts", "shared")}
        return dataclasses.replace(ffn, **parts)  # type: ignore[arg-type]
    if not isinstance(ffn, GLU | MLP):
        return ffn
    with torch.device("meta"):
        down = ffn.build(d_model).get_submodule("down")
    assert isinstance(down, nn.Linear)
    return dataclasses.replace(ffn, hidden_size=down.in_features)


def _plain(config: TransformerConfig) -> TransformerConfig:
    """Return a config without what does not change the function of its weights."""
    layers = tuple(dataclasses.replace(layer, ffn=_untrained(layer.ffn)) for layer in config.depth_pattern)
    return dataclasses.replace(config, layers=layers, dropout=0.0, init=Normal())


def _function(config: OurConfig) -> dict[str, Any]:
    """Return what decides the function that a model computes once its weights are given."""
    explicit = _explicit(config)
    if isinstance(explicit, EncoderDecoderConfig):
        encoder, decoder = _plain(explicit.encoder), _plain(explicit.decoder)
        return dataclasses.replace(explicit, encoder=encoder, decoder=decoder).to_dict()
    return _plain(explicit).to_dict()


def _untrained(ffn: FFN | None) -> FFN | None:
    """Leave out of experts what matters in training only; a bias on their choice is part of the function."""
    if not isinstance(ffn, MoE):
        return ffn
    balance = LoadBias() if isinstance(ffn.balance, LoadBias) else None
    return dataclasses.replace(ffn, balance=balance, z_loss=0.0, capacity_factor=None)


def _differences(wanted: Any, got: Any, path: str = "") -> Iterator[str]:
    """Yield where two pieces of plain data differ, as ``path=wanted value``."""
    if isinstance(wanted, dict) and isinstance(got, dict) and wanted.keys() == got.keys():
        for key in wanted:
            yield from _differences(wanted[key], got[key], f"{path}.{key}" if path else key)
    elif isinstance(wanted, list) and isinstance(got, list) and len(wanted) == len(got):
        for index, (item, other) in enumerate(zip(wanted, got, strict=True)):
            yield from _differences(item, other, f"{path}.{index}")
    elif wanted != got:
        yield f"{path}={wanted}"

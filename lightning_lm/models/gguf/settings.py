"""Settings of a model: metadata of a GGUF file to the content of a ``config.json``, and back."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.functional.rope import llama3_frequencies, rope_frequencies
from lightning_lm.models.gguf.architectures import Architecture
from lightning_lm.models.gguf.file import GGUFFile
from lightning_lm.models.huggingface.rope_settings import read_rope, write_rope
from lightning_lm.models.positions import LinearScaling, Llama3Scaling, Rope, RopeScaling, YaRNScaling

__all__ = ["ROPE_FACTORS", "read_settings", "rope_factors", "write_settings"]

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with the factor by which the wavelength of each plane of the rotation is stretched: Llama 3.1's scaling."""
_OPTIONAL = ("head_dim", "rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
_GEMMA_LOCAL_BASE = 10_000.0


def read_settings(file: GGUFFile, architecture: Architecture) -> dict[str, Any]:
    """Return the content of the ``config.json`` of a file's model.

    Args:
        file: The file.
        architecture: Its architecture.

    Raises:
        CheckpointError: If the metadata lack a setting, or there is no embedding.
        ConfigurationError: If the positions are scaled in a way that is not known here.
    """
    metadata, shapes = file.metadata, file.shapes
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{file.path} has no token_embd.weight; is it a whole model, or one shard of several?")
    settings: dict[str, Any] = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    for key, name in architecture.settings.items():
        value = metadata.get(f"{architecture.name}.{name}")
        if key == "num_key_value_heads" and value is None:
            value = settings["num_attention_heads"]
        if value is None and key not in _OPTIONAL:
            raise CheckpointError(f"{file.path} lacks {architecture.name}.{name}, so its model cannot be built.")
        if isinstance(value, list):
            raise ConfigurationError(f"{file.path}: {architecture.name}.{name} differs between layers: {value[:4]}...")
        if value is not None:
            settings[key] = _short(value)
    settings.setdefault("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
    settings["vocab_size"] = shapes["token_embd.weight"][0]
    settings["tie_word_embeddings"] = "output.weight" not in shapes
    if architecture.model_type in ("llama", "qwen3"):
        settings["attention_bias"] = any(f"blk.0.attn_{stem}.bias" in shapes for stem in ("q", "k", "v", "output"))
    if architecture.model_type == "llama":
        settings["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    return settings | architecture.fixed(settings) | _read_rope(file, architecture, settings)


def write_settings(settings: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return the metadata of a model, by keys with the architecture's prefix.

    Args:
        settings: Content of its ``config.json``, completed by `complete`.
        architecture: Its architecture.

    Raises:
        ConfigurationError: If the positions are scaled in a way that GGUF has no key for.
    """
    found = {name: settings[key] for key, name in architecture.settings.items() if settings.get(key) is not None}
    found["attention.value_length"] = found["rope.dimension_count"] = settings["head_dim"]
    found["vocab_size"] = settings["vocab_size"]
    found.update(_write_rope(settings, architecture))
    return {f"{architecture.name}.{name}": value for name, value in found.items()}


def complete(settings: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return the content of a ``config.json`` with what it leaves to defaults.

    Args:
        settings: The content.
        vocab_size: Rows of the embedding.
    """
    heads = settings["num_attention_heads"]
    filled = dict(settings) | {"vocab_size": vocab_size}
    filled["num_key_value_heads"] = settings.get("num_key_value_heads") or heads
    filled["head_dim"] = settings.get("head_dim") or settings["hidden_size"] // heads
    filled["rms_norm_eps"] = settings.get("rms_norm_eps", 1e-6)
    return filled


def rope_factors(settings: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor `ROPE_FACTORS` of a model, float32 [head_dim / 2]; ``None`` unless it has Llama 3.1's scaling.

    Args:
        settings: Content of its ``config.json``, completed.
    """
    if isinstance(settings.get("layer_types"), list) and settings.get("model_type") == "gemma3_text":
        return None
    rope = read_rope(settings)
    return _llama3_factors(rope.scaling, rope.base, settings["head_dim"])


def _llama3_factors(scaling: RopeScaling | None, base: float, head_dim: int) -> Tensor | None:
    if not isinstance(scaling, Llama3Scaling):
        return None
    plain = rope_frequencies(head_dim, base)
    slowed = llama3_frequencies(
        plain,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_context_length=scaling.original_context_length,
    )
    return (plain / slowed).float()


def _read_rope(file: GGUFFile, architecture: Architecture, settings: dict[str, Any]) -> dict[str, Any]:
    def get(name: str, default: Any = None) -> Any:
        return file.metadata.get(f"{architecture.name}.rope.{name}", default)

    base, kind, factor = _short(get("freq_base", 10_000.0)), get("scaling.type"), _short(get("scaling.factor", 1.0))
    scaling: RopeScaling | None = None
    if ROPE_FACTORS in file.shapes:
        scaling = _recognised(file, base, settings)
    elif kind == "linear":
        scaling = LinearScaling(factor=factor) if factor != 1.0 else None
    elif kind == "yarn":
        original = get("scaling.original_context_length", settings["max_position_embeddings"])
        scaling = YaRNScaling(factor=factor, original_context_length=int(original))
    elif kind not in (None, "none"):
        raise ConfigurationError(
            f"{file.path} scales its positions by {kind!r}; known are linear, yarn and Llama 3.1's."
        )
    written = write_rope(Rope(base=base, scaling=scaling))
    if architecture.name != "gemma3":
        return written
    return written | {"rope_local_base_freq": _short(get("freq_base_swa", _GEMMA_LOCAL_BASE))}


def _recognised(file: GGUFFile, base: float, settings: dict[str, Any]) -> RopeScaling:
    """Return the scaling whose factors a file has: GGUF keeps them and not the four numbers that they come from."""
    factors = file.read(ROPE_FACTORS)
    highest = float(factors.max())
    written = file.metadata.get(f"{file.metadata['general.architecture']}.rope.scaling.original_context_length", 8192)
    for original in (int(written), 8192, 4096, 16384, 32768, settings["max_position_embeddings"]):
        scaling = Llama3Scaling(
            factor=round(highest, 4), low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=original
        )
        expected = _llama3_factors(scaling, base, settings["head_dim"])
        assert expected is not None
        if expected.shape == factors.shape and torch.allclose(expected, factors, rtol=1e-4):
            return scaling
    raise ConfigurationError(
        f"{file.path} scales its positions by factors of its own ({ROPE_FACTORS}, up to {highest:g}), which are not "
        "those of Llama 3.1 for a known original context."
    )


def _write_rope(settings: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    if architecture.name == "gemma3":
        return _write_gemma_rope(settings)
    rope = read_rope(settings)
    match rope.scaling:
        case LinearScaling(factor=factor):
            scaling: dict[str, Any] = {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
        case YaRNScaling(
            beta_fast=32.0, beta_slow=1.0, attention_factor=None, factor=factor, original_context_length=length
        ):
            scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
            scaling["rope.scaling.original_context_length"] = length
        case Llama3Scaling(original_context_length=length):  # a tensor; the length is for whoever recognises it
            scaling = {"rope.scaling.original_context_length": length}
        case None:
            scaling = {}
        case other:
            raise ConfigurationError(
                f"{other} cannot be written as GGUF; linear, YaRN with its defaults and Llama 3.1 can."
            )
    return {"rope.freq_base": rope.base, **scaling}


def _write_gemma_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    parameters = settings.get("rope_parameters") or {}
    full = parameters.get("full_attention") or {"rope_theta": settings.get("rope_theta", 1e6), **_old_scaling(settings)}
    local = parameters.get("sliding_attention") or {
        "rope_theta": settings.get("rope_local_base_freq", _GEMMA_LOCAL_BASE)
    }
    kind = full.get("rope_type", "default")
    if kind not in ("default", "linear") or local["rope_theta"] != _GEMMA_LOCAL_BASE:
        raise ConfigurationError(f"Rotary positions {dict(full)}, {dict(local)} cannot be written as GGUF of Gemma 3.")
    scaling = {"rope.scaling.type": kind, "rope.scaling.factor": full["factor"]} if kind == "linear" else {}
    return {"rope.freq_base": float(full["rope_theta"]), **scaling}


def _old_scaling(settings: Mapping[str, Any]) -> dict[str, Any]:
    return dict(settings.get("rope_scaling") or {})


def _short(value: Any) -> Any:
    """Return a float32 of a file as the decimal that was meant: 1e-05 and not 9.999999747378752e-06."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    return float(f"{value:.7g}")

"""Phi-3 and GLM-4, whose files hold several projections in one weight."""

from dataclasses import replace
from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.huggingface.families.family import (
    LLAMA_DEFAULTS,
    LLAMA_NAMES,
    LLAMA_REQUIRED,
    Family,
    Settings,
    attention_of,
    read_attention,
    read_body,
    write_body,
)
from lightning_lm.models.huggingface.renames import module_names
from lightning_lm.models.huggingface.rope_settings import read_rope
from lightning_lm.models.transformer import TransformerConfig

__all__ = ["GLM4", "PHI3"]

_GATE_AND_UP = {"model.layers.{i}.mlp.gate_up_proj": "layers.{i}.ffn.gate layers.{i}.ffn.up"}
_QKV = {"model.layers.{i}.self_attn.qkv_proj": "layers.{i}.mixer.q layers.{i}.mixer.k layers.{i}.mixer.v"}


def _without(*parts: str) -> tuple[Any, ...]:
    return tuple(name for name in LLAMA_NAMES if not any(f".{part}." in name.theirs for part in parts))


def _read_phi3(data: Settings) -> TransformerConfig:
    if data["resid_pdrop"] or data["embd_pdrop"]:
        raise ConfigurationError("resid_pdrop and embd_pdrop of this Phi-3 must be 0; dropout is not read here.")
    rope = read_rope(data, partial=True)
    attention = read_attention({**data, "partial_rotary_factor": None, "rope_parameters": None, "rope_scaling": None})
    return read_body(data, replace(attention, rope=rope, window=data["sliding_window"]))


def _write_phi3(config: TransformerConfig) -> dict[str, Any]:
    attention = attention_of(config.depth_pattern[0])
    if attention.rope is not None and attention.rope.scaling is not None:
        raise ConfigurationError(f"there is {attention.rope.scaling}, and Phi-3 knows LongRoPE only")
    fraction = 1.0 if attention.rope is None else attention.rope.fraction
    return write_body(config) | {
        "sliding_window": attention.window,
        "partial_rotary_factor": fraction,
        "original_max_position_embeddings": config.context_length,
    }


def _read_glm4(data: Settings) -> TransformerConfig:
    settings = {"partial_rotary_factor": 0.5, **data}
    rope = replace(read_rope(settings, partial=True), interleaved=True)
    plain = {**data, "partial_rotary_factor": None, "rope_parameters": None, "rope_scaling": None}
    attention = read_attention(plain, bias="qkv" if data["attention_bias"] else "none")
    return replace(read_body(data, replace(attention, rope=rope)), residual="sandwich")


def _write_glm4(config: TransformerConfig) -> dict[str, Any]:
    attention = attention_of(config.depth_pattern[0])
    return write_body(config) | {
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias == "qkv",
        "partial_rotary_factor": 0.5 if attention.rope is None else attention.rope.fraction,
    }


PHI3 = Family(
    architecture="Phi3ForCausalLM",
    prefix="model.",
    names=(*_without("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), *module_names(_QKV | _GATE_AND_UP)),
    required=LLAMA_REQUIRED,
    defaults=LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "sliding_window": None,
    },
    read=_read_phi3,
    write=_write_phi3,
)

GLM4 = Family(
    architecture="Glm4ForCausalLM",
    prefix="model.",
    names=(
        *_without("gate_proj", "up_proj", "post_attention_layernorm"),
        *module_names(
            _GATE_AND_UP
            | {
                "model.layers.{i}.post_self_attn_layernorm": "layers.{i}.mixer_post_norm",
                "model.layers.{i}.post_attention_layernorm": "layers.{i}.ffn_norm",
                "model.layers.{i}.post_mlp_layernorm": "layers.{i}.ffn_post_norm",
            }
        ),
    ),
    required=LLAMA_REQUIRED,
    defaults=LLAMA_DEFAULTS
    | {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1.5625e-07,
        "attention_bias": True,
    },
    read=_read_glm4,
    write=_write_glm4,
)

"""Llama, Mistral, Qwen2 and Qwen3."""

from dataclasses import replace
from typing import Any

from lightning_lm.models.attention import Attention
from lightning_lm.models.ffn import GLU
from lightning_lm.models.huggingface.families.family import (
    LLAMA_DEFAULTS,
    Settings,
    attention_of,
    expect,
    like_llama,
    read_attention,
    read_body,
    write_body,
)
from lightning_lm.models.transformer import TransformerConfig

__all__ = ["LLAMA_FAMILIES", "QWEN_DEFAULTS"]


def _read_llama(data: Settings) -> TransformerConfig:
    return read_body(
        data, read_attention(data, bias="all" if data["attention_bias"] else "none"), bias=data["mlp_bias"]
    )


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    attention, ffn = attention_of(config.depth_pattern[0]), expect(GLU, config.depth_pattern[0].ffn, "ffn")
    return write_body(config) | {
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias == "all",
        "mlp_bias": ffn.bias,
    }


def _read_mistral(data: Settings) -> TransformerConfig:
    return read_body(data, replace(read_attention(data), window=data["sliding_window"]))


def _write_mistral(config: TransformerConfig) -> dict[str, Any]:
    attention = attention_of(config.depth_pattern[0])
    return write_body(config) | {"head_dim": attention.head_dim, "sliding_window": attention.window}


def _read_qwen2(data: Settings) -> TransformerConfig:
    return _qwen(data, read_attention(data, bias="qkv"))


def _write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    return write_body(config) | _windows(config)


def _read_qwen3(data: Settings) -> TransformerConfig:
    attention = read_attention(data, bias="all" if data["attention_bias"] else "none")
    return _qwen(data, replace(attention, qk_norm="head"))


def _write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    attention = attention_of(config.depth_pattern[0])
    own = {"head_dim": attention.head_dim, "attention_bias": attention.bias == "all"}
    return write_body(config) | own | _windows(config)


def _qwen(data: Settings, attention: Attention) -> TransformerConfig:
    """Return a config in which some layers see a window, as Qwen's settings say."""
    window = data["sliding_window"] if data["use_sliding_window"] else None
    first = data["max_window_layers"]
    kinds = data["layer_types"] or [
        "full_attention" if index < first else "sliding_attention" for index in range(data["num_hidden_layers"])
    ]
    return read_body(data, *(replace(attention, window=window if kind[0] == "s" else None) for kind in kinds))


def _windows(config: TransformerConfig) -> dict[str, Any]:
    """Return Qwen's settings of the layers' windows."""
    windows = [attention_of(layer).window for layer in config.depth_pattern]
    known = {window for window in windows if window is not None}
    return {
        "use_sliding_window": bool(known),
        "sliding_window": max(known, default=None),
        "max_window_layers": config.num_layers if not known else 0,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


QWEN_DEFAULTS = LLAMA_DEFAULTS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
LLAMA_FAMILIES = {
    "llama": like_llama("LlamaForCausalLM", LLAMA_DEFAULTS, _read_llama, _write_llama),
    "mistral": like_llama(
        "MistralForCausalLM",
        LLAMA_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
        _read_mistral,
        _write_mistral,
    ),
    "qwen2": like_llama("Qwen2ForCausalLM", QWEN_DEFAULTS, _read_qwen2, _write_qwen2),
    "qwen3": like_llama("Qwen3ForCausalLM", QWEN_DEFAULTS | {"head_dim": 128}, _read_qwen3, _write_qwen3),
}

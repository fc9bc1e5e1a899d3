"""SmolLM3: Llama with every fourth layer without positions, and with windows in any of the layers."""

from dataclasses import replace
from typing import Any

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

__all__ = ["SMOLLM3"]


def _read(data: Settings) -> TransformerConfig:
    depth = data["num_hidden_layers"]
    rotates = data["no_rope_layers"] or [
        int((index + 1) % data["no_rope_layer_interval"] != 0) for index in range(depth)
    ]
    slides = [bool(data["use_sliding_window"]) and not has for has in rotates[:depth]]
    if data["layer_types"]:
        slides = [kind == "sliding_attention" for kind in data["layer_types"][:depth]]
    attention = read_attention(data, bias="all" if data["attention_bias"] else "none")
    mixers = (
        replace(attention, rope=attention.rope if has else None, window=data["sliding_window"] if local else None)
        for has, local in zip(rotates, slides, strict=False)
    )
    return read_body(data, *mixers, bias=data["mlp_bias"])


def _write(config: TransformerConfig) -> dict[str, Any]:
    pattern = [attention_of(layer) for layer in config.depth_pattern]
    rotary = next((layer for layer in config.depth_pattern if attention_of(layer).rope is not None), None)
    settings = write_body(config if rotary is None else replace(config, layers=rotary))
    window = max((mixer.window for mixer in pattern if mixer.window is not None), default=None)
    return settings | {
        "attention_bias": pattern[0].bias == "all",
        "mlp_bias": expect(GLU, config.depth_pattern[0].ffn, "ffn").bias,
        "no_rope_layers": [int(mixer.rope is not None) for mixer in pattern],
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": ["full_attention" if mixer.window is None else "sliding_attention" for mixer in pattern],
    }


SMOLLM3 = like_llama(
    "SmolLM3ForCausalLM",
    LLAMA_DEFAULTS
    | {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
    },
    _read,
    _write,
)

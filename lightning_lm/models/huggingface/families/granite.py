"""Granite: Llama whose embeddings, scores, residuals and logits are multiplied by constants."""

from dataclasses import replace
from typing import Any

from lightning_lm.errors import ConfigurationError
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

__all__ = ["GRANITE"]

_MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def _read(data: Settings) -> TransformerConfig:
    if not data["logits_scaling"]:
        raise ConfigurationError("logits_scaling=0 of this Granite would divide the logits by zero.")
    attention = read_attention(data, bias="all" if data["attention_bias"] else "none")
    body = read_body(data, replace(attention, scale=float(data["attention_multiplier"])), bias=data["mlp_bias"])
    return replace(
        body,
        embed_scale=_factor(data["embedding_multiplier"]),
        residual_scale=_factor(data["residual_multiplier"]),
        output_scale=_factor(1.0 / data["logits_scaling"]),
    )


def _factor(value: float) -> float | None:
    return None if value == 1 else float(value)


def _write(config: TransformerConfig) -> dict[str, Any]:
    attention, ffn = attention_of(config.depth_pattern[0]), expect(GLU, config.depth_pattern[0].ffn, "ffn")
    scales = (config.embed_scale, config.residual_scale, config.output_scale)
    embedding, residual, output = (1.0 if scale is None else scale for scale in scales)
    if attention.scale is None:
        raise ConfigurationError("the attention has no scale of its own")
    if not output:
        raise ConfigurationError("output_scale is 0")
    return write_body(config) | {
        "attention_bias": attention.bias == "all",
        "mlp_bias": ffn.bias,
        "embedding_multiplier": embedding,
        "residual_multiplier": residual,
        "attention_multiplier": attention.scale,
        "logits_scaling": _inverse(output),
    }


def _inverse(scale: float) -> float:
    """Return the divisor that gives exactly this factor."""
    divisor = 1.0 / scale
    rounded = float(round(divisor))
    return rounded if rounded and 1.0 / rounded == scale else divisor


GRANITE = like_llama("GraniteForCausalLM", LLAMA_DEFAULTS | _MULTIPLIERS, _read, _write)

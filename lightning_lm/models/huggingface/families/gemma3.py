"""Gemma 3, the decoder of text: norms on both sides of a layer, and five layers with a window to one without."""

from dataclasses import replace
from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.ffn import GLU
from lightning_lm.models.huggingface.families.family import (
    LLAMA_DEFAULTS,
    LLAMA_NAMES,
    LLAMA_REQUIRED,
    Family,
    Settings,
    attention_of,
    expect,
    read_attention,
    read_body,
    write_body,
)
from lightning_lm.models.huggingface.renames import module_names
from lightning_lm.models.huggingface.rope_settings import read_rope, write_layer_ropes
from lightning_lm.models.norms import RMSNorm
from lightning_lm.models.transformer import TransformerConfig

__all__ = ["GEMMA3"]

_BASES = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}


def _read(data: Settings) -> TransformerConfig:
    if data["use_bidirectional_attention"]:
        raise ConfigurationError("use_bidirectional_attention=true of this Gemma 3 is not known here; only false is.")
    if data["attn_logit_softcapping"] is not None:
        raise ConfigurationError(
            f"attn_logit_softcapping={data['attn_logit_softcapping']} of this Gemma 3 is read by nobody: transformers "
            "passes it over. Set it to null."
        )
    period = data["sliding_window_pattern"]
    kinds = data["layer_types"] or [
        "sliding_attention" if (index + 1) % period else "full_attention" for index in range(data["num_hidden_layers"])
    ]
    plain = replace(
        read_attention({**data, "rope_parameters": None, "rope_scaling": None}, bias=_bias(data)),
        qk_norm="head",
        scale=float(data["query_pre_attn_scalar"]) ** -0.5,
    )
    mixers = {}
    for kind, base in _BASES.items():
        rope = read_rope(_rope_settings(data, kind, base), kind_of_layer=kind)
        window = data["sliding_window"] if kind[0] == "s" else None
        mixers[kind] = replace(plain, rope=rope, window=window)
    config = read_body({**data, "hidden_act": data["hidden_activation"]}, *(mixers[kind] for kind in kinds))
    return replace(
        config,
        norm=RMSNorm(eps=float(data["rms_norm_eps"]), offset=1.0),
        residual="sandwich",
        embed_scale=float(data["hidden_size"]) ** 0.5,
        logit_softcap=data["final_logit_softcapping"],
    )


def _rope_settings(data: Settings, kind: str, base: float) -> dict[str, Any]:
    """Return settings with a base for one kind of layers, in their old spelling or their new one."""
    base = data.get("rope_theta" if kind == "full_attention" else "rope_local_base_freq") or base
    new = data.get("rope_parameters")
    if new:
        return {**data, "rope_parameters": {**new, kind: {"rope_theta": base, **(new.get(kind) or {})}}}
    return {**data, "rope_theta": base, "rope_scaling": data.get("rope_scaling") if kind[0] == "f" else None}


def _bias(data: Settings) -> Any:
    return "all" if data["attention_bias"] else "none"


def _write(config: TransformerConfig) -> dict[str, Any]:
    pattern = [attention_of(layer) for layer in config.depth_pattern]
    attention, ffn = pattern[0], expect(GLU, config.depth_pattern[0].ffn, "ffn")
    kinds = ["full_attention" if mixer.window is None else "sliding_attention" for mixer in pattern]
    ropes = {kind: mixer.rope for kind, mixer in zip(kinds, pattern, strict=True)}
    if attention.scale is None:
        raise ConfigurationError("the attention has no scale of its own")
    settings = write_body(replace(config, norm=RMSNorm(eps=expect(RMSNorm, config.norm, "norm").eps)))
    for old in ("rope_theta", "rope_scaling", "hidden_act"):
        settings.pop(old)
    return settings | {
        "hidden_activation": {"gelu_tanh": "gelu_pytorch_tanh"}.get(ffn.activation, ffn.activation),
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias == "all",
        "query_pre_attn_scalar": round(attention.scale**-2),
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": max((mixer.window for mixer in pattern if mixer.window is not None), default=4096),
        "layer_types": kinds,
        "rope_parameters": write_layer_ropes({kind: ropes.get(kind) or attention.rope for kind in _BASES}),
    }


GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    prefix="model.",
    names=(
        *(name for name in LLAMA_NAMES if ".post_attention_layernorm." not in name.theirs),
        *module_names(
            {
                "model.layers.{i}.post_attention_layernorm": "layers.{i}.mixer_post_norm",
                "model.layers.{i}.pre_feedforward_layernorm": "layers.{i}.ffn_norm",
                "model.layers.{i}.post_feedforward_layernorm": "layers.{i}.ffn_post_norm",
            }
        ),
    ),
    required=LLAMA_REQUIRED,
    defaults=LLAMA_DEFAULTS
    | {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "layer_types": None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    read=_read,
    write=_write,
)

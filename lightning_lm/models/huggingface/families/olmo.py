"""OLMo 2 and OLMo 3: norms behind the sublayers, and queries and keys that are normalised over all heads."""

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
from lightning_lm.models.huggingface.rope_settings import read_rope, write_layer_ropes
from lightning_lm.models.transformer import TransformerConfig

__all__ = ["OLMO_FAMILIES"]

_THETA = 500_000.0


def _read_olmo2(data: Settings) -> TransformerConfig:
    attention = replace(read_attention(data, bias="all" if data["attention_bias"] else "none"), qk_norm="full")
    return replace(read_body(data, attention), residual="reordered")


def _write_olmo2(config: TransformerConfig) -> dict[str, Any]:
    return write_body(config) | {"attention_bias": attention_of(config.depth_pattern[0]).bias == "all"}


def _read_olmo3(data: Settings) -> TransformerConfig:
    kinds = data["layer_types"] or [
        "sliding_attention" if (index + 1) % 4 else "full_attention" for index in range(data["num_hidden_layers"])
    ]
    _check_base(data)
    plain = {**data, "rope_parameters": None, "rope_scaling": None}
    attention = replace(read_attention(plain, bias="all" if data["attention_bias"] else "none"), qk_norm="full")
    mixers = {
        kind: replace(
            attention,
            rope=read_rope(data if data.get("rope_parameters") or kind[0] == "f" else plain, kind_of_layer=kind),
            window=data["sliding_window"] if kind[0] == "s" else None,
        )
        for kind in set(kinds)
    }
    return replace(read_body(data, *(mixers[kind] for kind in kinds)), residual="reordered")


def _check_base(data: Settings) -> None:
    """Refuse an old spelling that releases of transformers read as different functions."""
    theta = data.get("rope_theta") or _THETA
    if not data.get("rope_parameters") and theta != _THETA:
        raise ConfigurationError(
            f"rope_theta={theta} of this OLMo 3 does not say what its layers with a window rotate by, and releases of "
            "transformers disagree. Give both kinds: rope_parameters: "
            f"{{'sliding_attention': {{'rope_type': 'default', 'rope_theta': {theta}}}, 'full_attention': {{...}}}}."
        )


def _write_olmo3(config: TransformerConfig) -> dict[str, Any]:
    pattern = [attention_of(layer) for layer in config.depth_pattern]
    kinds = ["full_attention" if mixer.window is None else "sliding_attention" for mixer in pattern]
    ropes = {kind: mixer.rope for kind, mixer in zip(kinds, pattern, strict=True)}
    settings = _write_olmo2(config)
    for old in ("rope_theta", "rope_scaling"):
        settings.pop(old)
    both = ("sliding_attention", "full_attention")
    return settings | {
        "sliding_window": max((mixer.window for mixer in pattern if mixer.window is not None), default=4096),
        "layer_types": kinds,
        "rope_parameters": write_layer_ropes({kind: ropes.get(kind) or pattern[0].rope for kind in both}),
    }


_NAMES = (
    *(name for name in LLAMA_NAMES if "layernorm." not in name.theirs),
    *module_names(
        {
            "model.layers.{i}.post_attention_layernorm": "layers.{i}.mixer_norm",
            "model.layers.{i}.post_feedforward_layernorm": "layers.{i}.ffn_norm",
        }
    ),
)
_DEFAULTS = LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5}

OLMO_FAMILIES = {
    "olmo2": Family("Olmo2ForCausalLM", "model.", _NAMES, LLAMA_REQUIRED, _DEFAULTS, _read_olmo2, _write_olmo2),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        "model.",
        _NAMES,
        LLAMA_REQUIRED,
        _DEFAULTS | {"rope_theta": _THETA, "sliding_window": 4096, "layer_types": None},
        _read_olmo3,
        _write_olmo3,
    ),
}

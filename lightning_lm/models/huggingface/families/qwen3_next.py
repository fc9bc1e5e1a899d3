"""Qwen3-Next: three layers of gated DeltaNet, then one of gated attention; dense feed-forward layers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.ffn import GLU
from lightning_lm.models.gated_attention import GatedAttention
from lightning_lm.models.huggingface.families.family import (
    LLAMA_DEFAULTS,
    LLAMA_NAMES,
    LLAMA_REQUIRED,
    THEIR_ACTIVATIONS,
    Family,
    Settings,
    activation,
    expect,
    read_attention,
    read_body,
    std,
)
from lightning_lm.models.huggingface.renames import PerGroup, Rename, Separated, module_names
from lightning_lm.models.huggingface.rope_settings import positions_written, write_rope
from lightning_lm.models.mixer import Mixer
from lightning_lm.models.norms import RMSNorm
from lightning_lm.models.recurrent.delta_net import GatedDeltaNet
from lightning_lm.models.transformer import Layer, TransformerConfig

__all__ = ["QWEN3_NEXT"]

_MIXER = "layers.{i}.mixer."


def _read(data: Settings) -> TransformerConfig:
    num_layers = data["num_hidden_layers"]
    if activation(data["hidden_act"]) != "silu":
        raise ConfigurationError(
            f"hidden_act={data['hidden_act']!r} of this Qwen3-Next is not known here: it is that of the convolutions "
            "too, which have silu."
        )
    experts = [
        index
        for index in range(num_layers)
        if index not in (data["mlp_only_layers"] or ())
        and data["num_experts"]
        and (index + 1) % data["decoder_sparse_step"] == 0
    ]
    if experts:
        raise ConfigurationError(
            f"Layers {experts[:3]}... of this Qwen3-Next have experts, which this family cannot read yet; dense layers "
            "(mlp_only_layers) are known. The model can be used through lightning_lm.models.TransformersModel."
        )
    rope = dict(data.get("rope_parameters") or {})
    fraction = rope.pop("partial_rotary_factor", data["partial_rotary_factor"])
    plain = {**data, "rope_parameters": rope or None, "partial_rotary_factor": None}
    read = read_attention(plain, bias="all" if data["attention_bias"] else "none")
    assert read.rope is not None
    attention = GatedAttention(
        num_heads=read.num_heads,
        num_kv_heads=read.num_kv_heads,
        head_dim=read.head_dim,
        rope=replace(read.rope, fraction=float(fraction)),
        dropout=read.dropout,
        bias=read.bias,
        qk_norm="head",
    )
    recurrent = GatedDeltaNet(
        num_heads=data["linear_num_key_heads"],
        num_v_heads=data["linear_num_value_heads"],
        head_dim=data["linear_key_head_dim"],
        v_head_dim=data["linear_value_head_dim"],
        conv=data["linear_conv_kernel_dim"],
    )
    kinds = data["layer_types"] or [
        "full_attention" if (index + 1) % 4 == 0 else "linear_attention" for index in range(num_layers)
    ]
    mixers: list[Mixer] = [attention if kind == "full_attention" else recurrent for kind in kinds]
    body = read_body(data, *mixers)
    return replace(body, norm=RMSNorm(eps=float(data["rms_norm_eps"]), offset=1.0))


def _write(config: TransformerConfig) -> dict[str, Any]:
    layers = config.depth_pattern
    attention = next((layer.mixer for layer in layers if isinstance(layer.mixer, GatedAttention)), None)
    recurrent = next((layer.mixer for layer in layers if isinstance(layer.mixer, GatedDeltaNet)), None)
    if attention is None or recurrent is None or attention.rope is None:
        raise ConfigurationError("it needs layers of GatedDeltaNet and of GatedAttention with rotary positions")
    ffn = expect(GLU, layers[0].ffn, "ffn")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": ffn.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": THEIR_ACTIVATIONS[ffn.activation],
        "max_position_embeddings": positions_written(config.context_length, attention.rope.scaling),
        "rms_norm_eps": expect(RMSNorm, config.norm, "norm").eps,
        **write_rope(attention.rope),
        "partial_rotary_factor": attention.rope.fraction,
        "attention_bias": attention.bias == "all",
        "attention_dropout": attention.dropout,
        "linear_num_key_heads": recurrent.num_heads,
        "linear_num_value_heads": recurrent.num_v_heads,
        "linear_key_head_dim": recurrent.head_dim,
        "linear_value_head_dim": recurrent.v_head_dim,
        "linear_conv_kernel_dim": recurrent.conv,
        "layer_types": [_kind(layer) for layer in layers],
        "mlp_only_layers": list(range(config.num_layers)),
        "num_experts": 0,
        "initializer_range": std(config),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _kind(layer: Layer) -> str:
    return "full_attention" if isinstance(layer.mixer, GatedAttention) else "linear_attention"


def _names(config: TransformerConfig) -> Sequence[Rename]:
    """Return the names of each layer by its mixer: both kinds have ``q``, ``k``, ``v`` and ``o`` here."""
    names = [entry for entry in LLAMA_NAMES if "self_attn" not in entry.theirs]
    for index, layer in enumerate(config.depth_pattern):
        if isinstance(layer.mixer, GatedAttention):
            of_layer = _names_of_attention(layer.mixer)
        else:
            of_layer = _names_of_recurrence(expect(GatedDeltaNet, layer.mixer, "mixer"))
        names += [entry.in_layer(index) for entry in of_layer]
    return names


def _names_of_attention(mixer: GatedAttention) -> list[Rename]:
    queries = [
        Rename(
            f"model.layers.{{i}}.self_attn.q_proj.{kind}",
            (f"{_MIXER}q.{kind}", f"{_MIXER}gate.{kind}"),
            layout=PerGroup(groups=mixer.num_heads),
        )
        for kind in ("weight", "bias")
    ]
    return [*queries, *(entry for entry in LLAMA_NAMES if "self_attn" in entry.theirs and "q_proj" not in entry.theirs)]


def _names_of_recurrence(mixer: GatedDeltaNet) -> list[Rename]:
    theirs, per_head = "model.layers.{i}.linear_attn.", PerGroup(groups=mixer.num_heads)

    def of_mixer(letters: str, prefix: str = "") -> tuple[str, ...]:
        return tuple(f"{_MIXER}{prefix}{letter}.weight" for letter in letters)

    return [
        *module_names({theirs + "norm": _MIXER + "norm", theirs + "out_proj": _MIXER + "o"}),
        Rename(theirs + "in_proj_qkvz.weight", of_mixer("qkvz"), layout=per_head),
        Rename(theirs + "in_proj_ba.weight", of_mixer("ba"), layout=per_head),
        Rename(theirs + "conv1d.weight", of_mixer("qkv", "conv_"), layout=Separated()),
        Rename(theirs + "A_log", (_MIXER + "time_step.A_log",)),
        Rename(theirs + "dt_bias", (_MIXER + "time_step.dt_bias",)),
    ]


QWEN3_NEXT = Family(
    architecture="Qwen3NextForCausalLM",
    prefix="model.",
    names=_names,
    required=LLAMA_REQUIRED,
    defaults=LLAMA_DEFAULTS
    | {
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "decoder_sparse_step": 1,
        "num_experts": 512,
        "mlp_only_layers": None,
        "layer_types": None,
    },
    read=_read,
    write=_write,
)
"""Qwen3-Next with dense feed-forward layers."""

"""gpt-oss: sinks in every head, a window in every other layer, and experts with clamped gates.

Files whose experts are quantized to MXFP4 are not read; save the model once in bfloat16 with ``transformers``.
"""

from dataclasses import fields, replace
from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.clamped_glu import ClampedGLU
from lightning_lm.models.experts import LaggedLoss, MoE, TopK
from lightning_lm.models.huggingface.families.family import (
    LLAMA_DEFAULTS,
    LLAMA_NAMES,
    LLAMA_REQUIRED,
    Family,
    Settings,
    expect,
    read_attention,
    read_body,
    shortest_cycle,
    std,
)
from lightning_lm.models.huggingface.renames import Flattened, PerGroup, Rename, module_names
from lightning_lm.models.huggingface.rope_settings import positions_written, write_rope
from lightning_lm.models.norms import RMSNorm
from lightning_lm.models.sink_attention import SinkAttention
from lightning_lm.models.transformer import Layer, TransformerConfig

__all__ = ["GPT_OSS"]

_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
"""Rotary settings where a file names none."""


def _read(data: Settings) -> TransformerConfig:
    if data.get("quantization_config"):
        raise ConfigurationError(
            "The experts of this gpt-oss are quantized, which is not read here. Save it once in bfloat16: "
            "AutoModelForCausalLM.from_pretrained(FOLDER, dtype='bfloat16').dequantize().save_pretrained(OTHER)."
        )
    if not (data.get("rope_parameters") or data.get("rope_scaling")):
        data = {**data, "rope_parameters": _ROPE}
    weight = float(data["router_aux_loss_coef"] or 0.0) if data["output_router_logits"] else 0.0
    experts = MoE(
        experts=ClampedGLU(
            hidden_size=data["intermediate_size"],
            bias=True,
            slope=float(data["swiglu_alpha"]),
            limit=float(data["swiglu_limit"]),
        ),
        num_experts=data["num_local_experts"],
        router=TopK(k=data["num_experts_per_tok"], score="chosen_softmax", normalise=False, bias=True),
        balance=LaggedLoss(weight=weight) if weight else None,
    )
    plain = read_attention(data, bias="all" if data["attention_bias"] else "none")
    attention = SinkAttention(**{field.name: getattr(plain, field.name) for field in fields(plain)})
    kinds = data["layer_types"] or [
        "full_attention" if index % 2 else "sliding_attention" for index in range(data["num_hidden_layers"])
    ]
    layers = tuple(
        Layer(mixer=replace(attention, window=data["sliding_window"] if kind[0] == "s" else None), ffn=experts)
        for kind in kinds
    )
    return replace(read_body(data, attention), layers=shortest_cycle(layers))


def _write(config: TransformerConfig) -> dict[str, Any]:
    pattern = config.depth_pattern
    mixers = [expect(SinkAttention, layer.mixer, "mixer") for layer in pattern]
    attention, part = mixers[0], expect(MoE, pattern[0].ffn, "ffn")
    experts, rope = expect(ClampedGLU, part.experts, "experts"), attention.rope
    if rope is None:
        raise ConfigurationError("there are no rotary positions")
    written = write_rope(rope)
    weight = part.balance.weight if isinstance(part.balance, LaggedLoss) else 0.0
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": experts.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "num_local_experts": part.num_experts,
        "num_experts_per_tok": part.router.k,
        "swiglu_alpha": experts.slope,
        "swiglu_limit": experts.limit,
        "router_aux_loss_coef": weight,
        "output_router_logits": weight > 0,
        "sliding_window": max((mixer.window for mixer in mixers if mixer.window is not None), default=128),
        "layer_types": ["full_attention" if mixer.window is None else "sliding_attention" for mixer in mixers],
        "max_position_embeddings": positions_written(config.context_length, rope.scaling),
        "rms_norm_eps": expect(RMSNorm, config.norm, "norm").eps,
        "rope_parameters": {
            **(written["rope_scaling"] or {"rope_type": "default"}),
            "rope_theta": written["rope_theta"],
        },
        "attention_bias": attention.bias == "all",
        "attention_dropout": attention.dropout,
        "initializer_range": std(config),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _names(config: TransformerConfig) -> tuple[Rename, ...]:
    part = expect(MoE, config.depth_pattern[0].ffn, "ffn")
    hidden_size = expect(ClampedGLU, part.experts, "experts").hidden_size or 1
    theirs, ours, count = "model.layers.{i}.mlp.experts", "layers.{i}.ffn.experts", part.num_experts
    pairs = PerGroup(axis=1, groups=hidden_size)
    flat = Flattened(groups=count * hidden_size, rows=count)
    return (
        *LLAMA_NAMES,
        *module_names({"model.layers.{i}.mlp.router": "layers.{i}.ffn.router"}),
        Rename("model.layers.{i}.self_attn.sinks", ("layers.{i}.mixer.sinks.scores",)),
        Rename(f"{theirs}.gate_up_proj", (f"{ours}.gate.weight", f"{ours}.up.weight"), transposed=True, layout=pairs),
        Rename(f"{theirs}.gate_up_proj_bias", (f"{ours}.gate.bias", f"{ours}.up.bias"), layout=flat),
        Rename(f"{theirs}.down_proj", (f"{ours}.down.weight",), transposed=True),
        Rename(f"{theirs}.down_proj_bias", (f"{ours}.down.bias",), layout=Flattened(rows=count)),
    )


GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    prefix="model.",
    names=_names,
    required=(*LLAMA_REQUIRED, "num_local_experts", "num_experts_per_tok"),
    defaults=LLAMA_DEFAULTS
    | {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "sliding_window": 128,
        "layer_types": None,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        "attention_bias": True,
    },
    read=_read,
    write=_write,
)

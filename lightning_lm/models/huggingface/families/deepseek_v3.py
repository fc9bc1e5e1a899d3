"""DeepSeek-V3: latent attention, and sigmoid routers whose choices are balanced by a bias."""

import math
from dataclasses import replace
from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.experts import Groups, LoadBias, MoE, TopK
from lightning_lm.models.ffn import GLU
from lightning_lm.models.huggingface.families.experts import expert_names
from lightning_lm.models.huggingface.families.family import (
    LLAMA_DEFAULTS,
    LLAMA_REQUIRED,
    THEIR_ACTIVATIONS,
    Family,
    Settings,
    activation,
    expect,
    read_body,
    shortest_cycle,
    std,
)
from lightning_lm.models.huggingface.renames import PerGroup, Rename, module_names
from lightning_lm.models.huggingface.rope_settings import positions_written, read_rope, write_rope
from lightning_lm.models.latent_attention import LatentAttention
from lightning_lm.models.norms import RMSNorm
from lightning_lm.models.transformer import TransformerConfig

__all__ = ["DEEPSEEK_V3"]


_ONLY = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _check(data: Settings) -> None:
    """Refuse settings that the model's first code reads and ``transformers`` passes over, where they would matter."""
    only = {**_ONLY, "head_dim": data["qk_rope_head_dim"]}
    for name, known in only.items():
        if data.get(name) not in (None, known):
            raise ConfigurationError(f"{name}={data[name]!r} of this DeepSeek-V3 is not known here; only {known!r} is.")


def _read(data: Settings) -> TransformerConfig:
    _check(data)
    key_dim = data["qk_nope_head_dim"] + data["qk_rope_head_dim"]
    attention = LatentAttention(
        num_heads=data["num_attention_heads"],
        kv_rank=data["kv_lora_rank"],
        q_rank=data["q_lora_rank"],
        nope_dim=data["qk_nope_head_dim"],
        rope_dim=data["qk_rope_head_dim"],
        v_dim=data["v_head_dim"],
        rope=replace(read_rope(data), interleaved=bool(data["rope_interleave"])),
        scale=key_dim**-0.5 * _temperature(data) ** 2,
        bias=data["attention_bias"],
        dropout=float(data["attention_dropout"] or 0.0),
    )
    config = read_body(data, attention)
    hidden_size, act = data["moe_intermediate_size"], activation(data["hidden_act"])
    count, chosen = data["n_group"] or 1, data["topk_group"] or 1
    experts = MoE(
        experts=GLU(hidden_size=hidden_size, activation=act),
        num_experts=data["n_routed_experts"],
        router=TopK(
            k=data["num_experts_per_tok"],
            score="sigmoid",
            normalise=data["norm_topk_prob"],
            scale=float(data["routed_scaling_factor"]),
            groups=Groups(count=count, chosen=chosen) if count > 1 else None,
        ),
        balance=LoadBias(),
        shared=GLU(hidden_size=hidden_size * data["n_shared_experts"], activation=act),
    )
    dense = data["first_k_dense_replace"]
    layers = tuple(replace(x, ffn=x.ffn if i < dense else experts) for i, x in enumerate(config.depth_pattern))
    return replace(config, layers=shortest_cycle(layers))


def _temperature(data: Settings) -> float:
    """Return what sharpens the scores of a context that YaRN has extended."""
    settings = data.get("rope_parameters") or data.get("rope_scaling") or {}
    factor, below = float(settings.get("factor") or 1.0), settings.get("mscale_all_dim")
    return 0.1 * float(below) * math.log(factor) + 1.0 if below and factor > 1 else 1.0


def _write(config: TransformerConfig) -> dict[str, Any]:
    pattern = config.depth_pattern
    attention = expect(LatentAttention, pattern[0].mixer, "mixer")
    kinds = [isinstance(layer.ffn, MoE) for layer in pattern]
    dense = kinds.index(True) if True in kinds else len(kinds)
    part = pattern[-1].ffn if True in kinds else MoE(shared=GLU(hidden_size=1), experts=GLU(hidden_size=1))
    part = expect(MoE, part, "ffn")
    plain = expect(GLU, pattern[0].ffn if dense else part.experts, "ffn")
    router, experts = expect(TopK, part.router, "router"), expect(GLU, part.experts, "experts")
    shared, groups = expect(GLU, part.shared, "shared"), router.groups
    hidden_size, shared_size = experts.hidden_size, shared.hidden_size
    if not hidden_size or not shared_size or shared_size % hidden_size:
        raise ConfigurationError("the shared expert's hidden_size is no multiple of the others'")
    scaling = {} if attention.rope.scaling is None else {"mscale_all_dim": _mscale_all_dim(attention)}
    rope = write_rope(attention.rope)
    if scaling["mscale_all_dim"] if scaling else False:
        factor = rope["rope_scaling"].pop("attention_factor", None)
        rope["rope_scaling"] |= scaling | ({} if factor is None else {"attention_factor": factor})
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": plain.hidden_size,
        "moe_intermediate_size": hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "n_shared_experts": shared_size // hidden_size,
        "n_routed_experts": part.num_experts,
        "routed_scaling_factor": router.scale,
        "kv_lora_rank": attention.kv_rank,
        "q_lora_rank": attention.q_rank,
        "qk_rope_head_dim": attention.rope_dim,
        "qk_nope_head_dim": attention.nope_dim,
        "v_head_dim": attention.v_dim,
        "n_group": 1 if groups is None else groups.count,
        "topk_group": 1 if groups is None else groups.chosen,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.normalise,
        "first_k_dense_replace": dense,
        "hidden_act": THEIR_ACTIVATIONS[plain.activation],
        "max_position_embeddings": positions_written(config.context_length, attention.rope.scaling),
        "rms_norm_eps": expect(RMSNorm, config.norm, "norm").eps,
        "rope_interleave": attention.rope.interleaved,
        **rope,
        "attention_bias": attention.bias,
        "attention_dropout": attention.dropout,
        "initializer_range": std(config),
        "tie_word_embeddings": config.tie_embeddings,
        "num_nextn_predict_layers": 0,
    }


def _mscale_all_dim(attention: LatentAttention) -> float | None:
    """Return the setting that gives the scale of the scores."""
    plain = (attention.nope_dim + attention.rope_dim) ** -0.5
    factor = getattr(attention.rope.scaling, "factor", 1.0)
    if attention.scale is None or math.isclose(attention.scale, plain) or factor <= 1:
        return None
    return round((math.sqrt(attention.scale / plain) - 1.0) / (0.1 * math.log(factor)), 12)


def _names(config: TransformerConfig) -> tuple[Rename, ...]:
    attention = expect(LatentAttention, config.depth_pattern[0].mixer, "mixer")
    layer, mixer = "model.layers.{i}", "layers.{i}.mixer"
    experts = expert_names(f"{layer}.mlp.gate", f"{layer}.mlp.experts.{{e}}", ("gate_proj", "up_proj", "down_proj"))
    return (
        *(entry for entry in experts(config) if ".self_attn.q_norm." not in entry.theirs),
        *module_names(
            {
                f"{layer}.self_attn.q_proj": f"{mixer}.q",
                f"{layer}.self_attn.q_a_proj": f"{mixer}.q_down",
                f"{layer}.self_attn.q_a_layernorm": f"{mixer}.q_norm",
                f"{layer}.self_attn.q_b_proj": f"{mixer}.q_up",
                f"{layer}.self_attn.kv_a_proj_with_mqa": f"{mixer}.kv_down {mixer}.k_rope",
                f"{layer}.self_attn.kv_a_layernorm": f"{mixer}.kv_norm",
                f"{layer}.mlp.shared_experts.gate_proj": "layers.{i}.ffn.shared.gate",
                f"{layer}.mlp.shared_experts.up_proj": "layers.{i}.ffn.shared.up",
                f"{layer}.mlp.shared_experts.down_proj": "layers.{i}.ffn.shared.down",
            }
        ),
        Rename(
            f"{layer}.self_attn.kv_b_proj.weight",
            (f"{mixer}.k_up.weight", f"{mixer}.v_up.weight"),
            layout=PerGroup(groups=attention.num_heads),
        ),
        Rename(f"{layer}.mlp.gate.e_score_correction_bias", ("layers.{i}.ffn.balance.bias",)),
    )


DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    prefix="model.",
    names=_names,
    required=(*LLAMA_REQUIRED, "kv_lora_rank", "n_routed_experts", "moe_intermediate_size"),
    defaults=LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 4096,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "rope_interleave": True,
    },
    read=_read,
    write=_write,
    predicts_further=True,
)

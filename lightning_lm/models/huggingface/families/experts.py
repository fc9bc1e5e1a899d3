"""Mixtures of experts with softmax routers: Mixtral, Qwen3-MoE and OLMoE.

Theirs has a weight for each expert, ours a stack for all of them. The weight of the load-balancing loss is read where
the settings ask for the loss; by itself `transformers` does not train with it either.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.experts import LaggedLoss, MoE, TopK
from lightning_lm.models.ffn import FFN, GLU
from lightning_lm.models.huggingface.families.family import (
    LLAMA_DEFAULTS,
    LLAMA_NAMES,
    LLAMA_REQUIRED,
    Family,
    Settings,
    activation,
    attention_of,
    expect,
    read_attention,
    read_body,
    shortest_cycle,
    write_body,
)
from lightning_lm.models.huggingface.renames import Rename
from lightning_lm.models.transformer import TransformerConfig

__all__ = ["EXPERT_FAMILIES", "expert_names"]


def expert_names(
    router: str, expert: str, projections: Sequence[str]
) -> Callable[[TransformerConfig], tuple[Rename, ...]]:
    """Return a function that makes the table of weights of Llama with experts in place of its feed-forward layers.

    Args:
        router: Their name of the router in layer ``{i}``.
        expert: Their name of expert ``{e}`` in layer ``{i}``.
        projections: Their names of the gate, up and down projection of an expert.
    """

    def names(config: TransformerConfig) -> tuple[Rename, ...]:
        sizes = [layer.ffn.num_experts for layer in config.depth_pattern if isinstance(layer.ffn, MoE)]
        stacks = tuple(
            Rename(
                f"{expert.replace('{e}', str(number))}.{theirs}.weight",
                (f"layers.{{i}}.ffn.experts.{ours}.weight[{number}]",),
            )
            for number in range(max(sizes, default=0))
            for theirs, ours in zip(projections, ("gate", "up", "down"), strict=True)
        )
        return (*LLAMA_NAMES, Rename(f"{router}.weight", ("layers.{i}.ffn.router.weight",)), *stacks)

    return names


def _read_mixtral(data: Settings) -> TransformerConfig:
    if data["router_jitter_noise"]:
        raise ConfigurationError(
            f"router_jitter_noise={data['router_jitter_noise']} of this Mixtral is not known here; set it to 0."
        )
    attention = replace(read_attention(data), window=data["sliding_window"])
    experts = _read_experts(data, data["num_local_experts"], data["intermediate_size"], normalise=True)
    return _with_experts(read_body(data, attention), experts)


def _write_mixtral(config: TransformerConfig) -> dict[str, Any]:
    part, attention = _experts_of(config), attention_of(config.depth_pattern[0])
    own = {"head_dim": attention.head_dim, "sliding_window": attention.window, "num_local_experts": part.num_experts}
    return write_body(_dense(config)) | own | _write_experts(part)


def _read_olmoe(data: Settings) -> TransformerConfig:
    if data["clip_qkv"] is not None:
        raise ConfigurationError(f"clip_qkv={data['clip_qkv']} of this OLMoE is not known here; only null is.")
    attention = replace(read_attention(data, bias="all" if data["attention_bias"] else "none"), qk_norm="full")
    experts = _read_experts(data, data["num_experts"], data["intermediate_size"], normalise=data["norm_topk_prob"])
    return _with_experts(read_body(data, attention), experts)


def _write_olmoe(config: TransformerConfig) -> dict[str, Any]:
    part, attention = _experts_of(config), attention_of(config.depth_pattern[0])
    own = {"attention_bias": attention.bias == "all", "num_experts": part.num_experts}
    normalise = expect(TopK, part.router, "router").normalise
    return write_body(_dense(config)) | own | _write_experts(part) | {"norm_topk_prob": normalise}


def _read_qwen3_moe(data: Settings) -> TransformerConfig:
    attention = replace(read_attention(data, bias="all" if data["attention_bias"] else "none"), qk_norm="head")
    attention = replace(attention, window=data["sliding_window"] if data["use_sliding_window"] else None)
    count = data.get("num_experts") or data.get("num_local_experts") or 128
    experts = _read_experts(data, count, data["moe_intermediate_size"], normalise=data["norm_topk_prob"])
    dense, step = data["mlp_only_layers"] or (), data["decoder_sparse_step"]
    sparse = [index not in dense and (index + 1) % step == 0 for index in range(data["num_hidden_layers"])]
    return _with_experts(read_body(data, attention), experts, sparse)


def _write_qwen3_moe(config: TransformerConfig) -> dict[str, Any]:
    part, attention = _experts_of(config), attention_of(config.depth_pattern[0])
    plain = [layer.ffn for layer in config.depth_pattern if isinstance(layer.ffn, GLU)]
    hidden_size = expect(GLU, part.experts, "experts").hidden_size
    return (
        write_body(_dense(config))
        | _write_experts(part)
        | {
            "head_dim": attention.head_dim,
            "attention_bias": attention.bias == "all",
            "use_sliding_window": attention.window is not None,
            "sliding_window": attention.window,
            "intermediate_size": plain[0].hidden_size if plain else hidden_size,
            "moe_intermediate_size": hidden_size,
            "num_experts": part.num_experts,
            "norm_topk_prob": expect(TopK, part.router, "router").normalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, layer in enumerate(config.depth_pattern) if not isinstance(layer.ffn, MoE)],
        }
    )


def _read_experts(data: Settings, count: int, hidden_size: int, *, normalise: bool) -> MoE:
    weight = float(data["router_aux_loss_coef"] or 0.0) if data["output_router_logits"] else 0.0
    return MoE(
        experts=GLU(hidden_size=hidden_size, activation=activation(data["hidden_act"])),
        num_experts=count,
        router=TopK(k=data["num_experts_per_tok"], score="softmax", normalise=normalise),
        balance=LaggedLoss(weight=weight) if weight else None,
    )


def _write_experts(part: MoE) -> dict[str, Any]:
    weight = part.balance.weight if isinstance(part.balance, LaggedLoss) else 0.0
    return {
        "num_experts_per_tok": part.router.k,
        "router_aux_loss_coef": weight,
        "output_router_logits": weight > 0,
    }


def _with_experts(config: TransformerConfig, part: MoE, sparse: Sequence[bool] | None = None) -> TransformerConfig:
    """Give layers experts: those that are sparse, by default all."""
    pattern = config.depth_pattern
    kinds = [True] * len(pattern) if sparse is None else sparse
    layers = tuple(replace(layer, ffn=part) if kind else layer for layer, kind in zip(pattern, kinds, strict=True))
    return replace(config, layers=shortest_cycle(layers))


def _experts_of(config: TransformerConfig) -> MoE:
    found = [layer.ffn for layer in config.depth_pattern if isinstance(layer.ffn, MoE)]
    if not found:
        raise ConfigurationError("there are no experts")
    return found[0]


def _dense(config: TransformerConfig) -> TransformerConfig:
    """Return a config with one expert in the place of many."""

    def single(ffn: FFN | None) -> FFN | None:
        return ffn.experts if isinstance(ffn, MoE) else ffn

    return replace(config, layers=tuple(replace(layer, ffn=single(layer.ffn)) for layer in config.depth_pattern))


def _family(
    architecture: str,
    defaults: Settings,
    read: Callable[[Settings], TransformerConfig],
    write: Callable[[TransformerConfig], dict[str, Any]],
    names: Callable[[TransformerConfig], Sequence[Rename]],
) -> Family:
    return Family(architecture, "model.", names, (*LLAMA_REQUIRED, "num_experts_per_tok"), defaults, read, write)


_DEFAULTS = LLAMA_DEFAULTS | {"router_aux_loss_coef": 0.001, "output_router_logits": False, "norm_topk_prob": False}
_QWEN_NAMES = expert_names(
    "model.layers.{i}.mlp.gate", "model.layers.{i}.mlp.experts.{e}", ("gate_proj", "up_proj", "down_proj")
)
_MIXTRAL_NAMES = expert_names(
    "model.layers.{i}.block_sparse_moe.gate", "model.layers.{i}.block_sparse_moe.experts.{e}", ("w1", "w3", "w2")
)

EXPERT_FAMILIES = {
    "mixtral": _family(
        "MixtralForCausalLM",
        _DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 131_072, "sliding_window": None}
        | {"num_local_experts": 8, "num_key_value_heads": 8, "rope_theta": 1_000_000.0}
        | {"router_jitter_noise": 0.0},
        _read_mixtral,
        _write_mixtral,
        _MIXTRAL_NAMES,
    ),
    "qwen3_moe": _family(
        "Qwen3MoeForCausalLM",
        _DEFAULTS | {"num_key_value_heads": 4, "max_position_embeddings": 32_768, "use_sliding_window": False}
        | {"sliding_window": 4096, "decoder_sparse_step": 1, "mlp_only_layers": None, "moe_intermediate_size": 768},
        _read_qwen3_moe,
        _write_qwen3_moe,
        _QWEN_NAMES,
    ),
    "olmoe": _family(
        "OlmoeForCausalLM",
        _DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_experts": 64, "clip_qkv": None},
        _read_olmoe,
        _write_olmoe,
        _QWEN_NAMES,
    ),
}  # fmt: skip

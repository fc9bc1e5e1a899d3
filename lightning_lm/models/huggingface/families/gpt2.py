"""GPT-2."""

from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.attention import Attention
from lightning_lm.models.ffn import MLP
from lightning_lm.models.huggingface.families.family import (
    THEIR_ACTIVATIONS,
    Family,
    Settings,
    activation,
    attention_of,
    expect,
    std,
)
from lightning_lm.models.huggingface.renames import module_names
from lightning_lm.models.init import DepthScaled
from lightning_lm.models.norms import LayerNorm
from lightning_lm.models.positions import LearnedPositions
from lightning_lm.models.transformer import Layer, TransformerConfig

__all__ = ["GPT2"]


def _read_gpt2(data: Settings) -> TransformerConfig:
    for name, needed in (("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)):
        if data[name] != needed:
            raise ConfigurationError(f"{name}={data[name]} of this GPT-2 is not known here; only {needed} is.")
    attention = Attention(
        num_heads=data["n_head"],
        rope=None,
        bias="all",
        scale=None if data["scale_attn_weights"] else 1.0,
        dropout=float(data["attn_pdrop"]),
    )
    hidden_size = data["n_inner"] or 4 * data["n_embd"]
    ffn = MLP(hidden_size=hidden_size, activation=activation(data["activation_function"]), bias=True)
    return TransformerConfig(
        vocab_size=data["vocab_size"],
        context_length=data["n_positions"],
        d_model=data["n_embd"],
        num_layers=data["n_layer"],
        layers=Layer(mixer=attention, ffn=ffn),
        norm=LayerNorm(eps=float(data["layer_norm_epsilon"])),
        positions=LearnedPositions(),
        tie_embeddings=data["tie_word_embeddings"],
        dropout=float(data["resid_pdrop"]),
        init=DepthScaled(std=float(data["initializer_range"])),
    )


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    attention, ffn = attention_of(config.depth_pattern[0]), expect(MLP, config.depth_pattern[0].ffn, "ffn")
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": attention.num_heads,
        "n_inner": ffn.hidden_size,
        "activation_function": THEIR_ACTIVATIONS[ffn.activation],
        "scale_attn_weights": attention.scale is None,
        "layer_norm_epsilon": expect(LayerNorm, config.norm, "norm").eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": attention.dropout,
        "initializer_range": std(config),
        "tie_word_embeddings": config.tie_embeddings,
    }


GPT2_NAMES = module_names(
    {
        "transformer.wte": "embed",
        "transformer.wpe": "positions",
        "transformer.h.{i}.ln_1": "layers.{i}.mixer_norm",
        "transformer.h.{i}.ln_2": "layers.{i}.ffn_norm",
        "transformer.ln_f": "norm",
        "lm_head": "head",
    }
) + module_names(
    {
        "transformer.h.{i}.attn.c_attn": "layers.{i}.mixer.q layers.{i}.mixer.k layers.{i}.mixer.v",
        "transformer.h.{i}.attn.c_proj": "layers.{i}.mixer.o",
        "transformer.h.{i}.mlp.c_fc": "layers.{i}.ffn.up",
        "transformer.h.{i}.mlp.c_proj": "layers.{i}.ffn.down",
    },
    transposed=True,
)
"""GPT-2, whose projections are stored ``[in, out]`` with queries, keys and values in one."""

_GPT2_DEFAULTS = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    names=GPT2_NAMES,
    required=("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"),
    defaults=_GPT2_DEFAULTS,
    read=_read_gpt2,
    write=_write_gpt2,
)

"""Mamba-2: a stack of SSD mixers without feed-forward layers."""

import math
from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.huggingface.families.family import Family, Settings, expect, shortest_cycle, std
from lightning_lm.models.huggingface.renames import Rename, Separated, module_names
from lightning_lm.models.init import Normal
from lightning_lm.models.norms import RMSNorm
from lightning_lm.models.recurrent.ssd import SSD
from lightning_lm.models.transformer import Layer, TransformerConfig

__all__ = ["MAMBA2"]


def _read(data: Settings) -> TransformerConfig:
    limits = [_number(limit) for limit in data["time_step_limit"]]
    known = {"hidden_act": "silu", "use_conv_bias": True}
    for name, value in known.items():
        if data[name] != value:
            raise ConfigurationError(f"{name}={data[name]} is not known in Mamba-2; only {value} is.")
    if limits != [0.0, math.inf]:
        raise ConfigurationError(f"time_step_limit={limits} is not known here; only (0, inf) is.")
    mixer = SSD(
        num_heads=data["num_heads"],
        head_dim=data["head_dim"],
        state=data["state_size"],
        groups=data["n_groups"],
        conv=data["conv_kernel"],
        expand=float(data["expand"]),
        bias=data["use_bias"],
    )
    return TransformerConfig(
        vocab_size=data["vocab_size"],
        d_model=data["hidden_size"],
        num_layers=data["num_hidden_layers"],
        layers=shortest_cycle((Layer(mixer=mixer, ffn=None),) * data["num_hidden_layers"]),
        norm=RMSNorm(eps=float(data["layer_norm_epsilon"])),
        tie_embeddings=data["tie_word_embeddings"],
        init=Normal(std=float(data["initializer_range"])),
    )


def _number(value: Any) -> float:
    """Return a number, which ``transformers`` writes as ``{"__float__": "Infinity"}`` if JSON has none for it."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def _write(config: TransformerConfig) -> dict[str, Any]:
    mixer = expect(SSD, config.depth_pattern[0].mixer, "mixer")
    heads = mixer.heads(config.d_model)
    expand = heads * mixer.head_dim / config.d_model
    if expand != int(expand):
        raise ConfigurationError(f"the heads are {expand:g} times as wide as the model")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_heads": heads,
        "head_dim": mixer.head_dim,
        "state_size": mixer.state,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.conv,
        "expand": int(expand),
        "use_bias": mixer.bias,
        "layer_norm_epsilon": expect(RMSNorm, config.norm, "norm").eps,
        "initializer_range": std(config),
        "tie_word_embeddings": config.tie_embeddings,
    }


_MIXER = "layers.{i}.mixer."
_STREAMS = ("z", "x", "B", "C", "dt")
MAMBA2 = Family(
    architecture="Mamba2ForCausalLM",
    prefix="backbone.",
    names=(
        *module_names(
            {
                "backbone.embeddings": "embed",
                "backbone.layers.{i}.norm": "layers.{i}.mixer_norm",
                "backbone.layers.{i}.mixer.in_proj": " ".join(_MIXER + stream for stream in _STREAMS),
                "backbone.layers.{i}.mixer.norm": _MIXER + "norm",
                "backbone.layers.{i}.mixer.out_proj": _MIXER + "o",
                "backbone.norm_f": "norm",
                "lm_head": "head",
            }
        ),
        Rename(
            "backbone.layers.{i}.mixer.conv1d.weight",
            tuple(f"{_MIXER}conv_{stream}.weight" for stream in "xBC"),
            layout=Separated(),
        ),
        Rename("backbone.layers.{i}.mixer.conv1d.bias", tuple(f"{_MIXER}conv_{stream}.bias" for stream in "xBC")),
        Rename("backbone.layers.{i}.mixer.A_log", (_MIXER + "time_step.A_log",)),
        Rename("backbone.layers.{i}.mixer.dt_bias", (_MIXER + "time_step.dt_bias",)),
        Rename("backbone.layers.{i}.mixer.D", (_MIXER + "skip.weight",)),
    ),
    required=("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim"),
    defaults={
        "state_size": 128,
        "layer_norm_epsilon": 1e-5,
        "expand": 2,
        "conv_kernel": 4,
        "n_groups": 8,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "initializer_range": 0.1,
        "time_step_limit": (0.0, math.inf),
        "tie_word_embeddings": False,
    },
    read=_read,
    write=_write,
)
"""Mamba-2."""

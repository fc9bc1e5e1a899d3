"""Names and layouts of weights in ``transformers``: one table per layout, read in both directions."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["GPT2_NAMES", "LLAMA_NAMES", "Rename", "renames_for"]


@dataclass(frozen=True)
class Rename:
    """One weight of theirs, and the one or more of ours that it holds.

    Args:
        theirs: Name in the file; ``{i}`` stands for the index of a layer.
        ours: Names in our state dict. Several are stacked along the output axis in theirs.
        transposed: True if matrices are stored ``[in, out]``.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False

    def in_layer(self, index: int) -> "Rename":
        """Return the same for one layer."""
        ours = tuple(name.replace("{i}", str(index)) for name in self.ours)
        return replace(self, theirs=self.theirs.replace("{i}", str(index)), ours=ours)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return our weights, which all have one shape, from theirs."""
        return self._turn(tensor).tensor_split(len(self.ours))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return their weight from ours."""
        return self._turn(tensors[0] if len(tensors) == 1 else torch.cat(list(tensors)))

    def _turn(self, tensor: Tensor) -> Tensor:
        return tensor.t() if self.transposed and tensor.dim() == 2 else tensor


def renames_for(table: Sequence[Rename], names: Collection[str], num_layers: int) -> list[Rename]:
    """Return the entries of a table whose weights a model has, spelt out for every layer.

    Args:
        table: One of the tables of this module.
        names: Names in the model's state dict.
        num_layers: Depth of the model.
    """
    spelt = [entry for item in table for entry in _in_each_layer(item, num_layers)]
    return [entry for entry in spelt if all(name in names for name in entry.ours)]


def _in_each_layer(item: Rename, num_layers: int) -> list[Rename]:
    return [item.in_layer(index) for index in range(num_layers)] if "{i}" in item.theirs else [item]


def _names(pairs: dict[str, str], *, transposed: bool = False) -> tuple[Rename, ...]:
    """Spell modules out to weights and biases. A model without a bias has no use for that line."""
    return tuple(
        Rename(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours.split()), transposed)
        for theirs, ours in pairs.items()
        for kind in ("weight", "bias")
    )


LLAMA_NAMES = _names(
    {
        "model.embed_tokens": "embed",
        "model.layers.{i}.input_layernorm": "layers.{i}.mixer_norm",
        "model.layers.{i}.self_attn.q_proj": "layers.{i}.mixer.q",
        "model.layers.{i}.self_attn.k_proj": "layers.{i}.mixer.k",
        "model.layers.{i}.self_attn.v_proj": "layers.{i}.mixer.v",
        "model.layers.{i}.self_attn.o_proj": "layers.{i}.mixer.o",
        "model.layers.{i}.self_attn.q_norm": "layers.{i}.mixer.q_norm",
        "model.layers.{i}.self_attn.k_norm": "layers.{i}.mixer.k_norm",
        "model.layers.{i}.post_attention_layernorm": "layers.{i}.ffn_norm",
        "model.layers.{i}.mlp.gate_proj": "layers.{i}.ffn.gate",
        "model.layers.{i}.mlp.up_proj": "layers.{i}.ffn.up",
        "model.layers.{i}.mlp.down_proj": "layers.{i}.ffn.down",
        "model.norm": "norm",
        "lm_head": "head",
    }
)
"""Llama, and Mistral, Qwen2 and Qwen3 after it."""

GPT2_NAMES = _names(
    {
        "transformer.wte": "embed",
        "transformer.wpe": "positions",
        "transformer.h.{i}.ln_1": "layers.{i}.mixer_norm",
        "transformer.h.{i}.ln_2": "layers.{i}.ffn_norm",
        "transformer.ln_f": "norm",
        "lm_head": "head",
    }
) + _names(
    {
        "transformer.h.{i}.attn.c_attn": "layers.{i}.mixer.q layers.{i}.mixer.k layers.{i}.mixer.v",
        "transformer.h.{i}.attn.c_proj": "layers.{i}.mixer.o",
        "transformer.h.{i}.mlp.c_fc": "layers.{i}.ffn.up",
        "transformer.h.{i}.mlp.c_proj": "layers.{i}.ffn.down",
    },
    transposed=True,
)
"""GPT-2, whose projections are stored ``[in, out]`` with queries, keys and values in one."""

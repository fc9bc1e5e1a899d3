"""Architectures of llama.cpp and their counterparts in ``transformers``: settings, names and layouts of weights.

llama.cpp interleaves the two halves of each head in the query and key projections of a Llama, adds 1 to the norm
weights of a Gemma, and has some settings in its code (which layers of a Gemma attend within a window). All of that is
undone here when a file is read, and done when one is written.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lightning_lm.errors import ConfigurationError

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "for_model_type"]

Settings = dict[str, Any]

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = {
    **_LLAMA_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_COMMON = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
_WINDOWED = {**_COMMON, "sliding_window": "attention.sliding_window"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of llama.cpp and the model type of ``transformers`` that computes the same.

    Args:
        name: ``general.architecture``.
        model_type: In ``config.json``.
        class_name: Class of the causal language model.
        layer: Module paths within a layer by the names of llama.cpp.
        settings: Keys of GGUF, without the architecture's prefix, by those of ``config.json``.
        fixed: Settings that llama.cpp has in its code, by the settings read.
        interleaved: True if the rows of the query and key projections are interleaved for the rotation.
        norm_offset: Number that llama.cpp adds to the weights of norms.
        tied: True if the output layer is always the embedding.
    """

    name: str
    model_type: str
    class_name: str
    layer: Mapping[str, str]
    settings: Mapping[str, str]
    fixed: Callable[[Settings], Settings]
    interleaved: bool = False
    norm_offset: float = 0.0
    tied: bool = False

    def theirs(self, name: str) -> str | None:
        """Return the name in ``transformers`` of a weight of a GGUF file; ``None`` if there is none."""
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        if kind not in ("weight", "bias"):
            return None
        if block is None:
            return f"{_OUTER[stem]}.{kind}" if stem in _OUTER else None
        path = self.layer.get(block[2])
        return None if path is None else f"model.layers.{block[1]}.{path}.{kind}"

    def ours(self, name: str) -> str | None:
        """Return the name in a GGUF file of a weight of ``transformers``; ``None`` if there is none."""
        path, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
        if layer is None:
            stems = {value: key for key, value in _OUTER.items()}
            return f"{stems[path]}.{kind}" if path in stems else None
        stems = {value: key for key, value in self.layer.items()}
        return f"blk.{layer[1]}.{stems[layer[2]]}.{kind}" if layer[2] in stems else None

    def read(self, name: str, tensor: Tensor, settings: Settings) -> Tensor:
        """Return a weight of a GGUF file in the layout of ``transformers``."""
        heads = self._rotated_heads(name, settings)
        if heads:
            tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return tensor - self.norm_offset if _is_norm(name) else tensor

    def write(self, name: str, tensor: Tensor, settings: Settings) -> Tensor:
        """Return a weight of ``transformers``, float32, in the layout of llama.cpp; ``name`` is llama.cpp's."""
        heads = self._rotated_heads(name, settings)
        if heads:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return tensor + self.norm_offset if _is_norm(name) else tensor

    def _rotated_heads(self, name: str, settings: Settings) -> int:
        stem = name.rpartition(".")[0].rpartition(".")[2]
        key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(stem)
        return int(settings[key]) if self.interleaved and key is not None else 0


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def architecture_of(metadata: Mapping[str, Any], source: object) -> Architecture:
    """Return the architecture of a file.

    Args:
        metadata: Metadata of the file.
        source: The file, for the message.

    Raises:
        ConfigurationError: If it is not known here.
    """
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ConfigurationError(
            f"{source} has the architecture {name!r}; read are {', '.join(ARCHITECTURES)}. If transformers knows it: "
            "AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).save_pretrained(folder)."
        )
    return ARCHITECTURES[name]


def for_model_type(settings: Settings) -> Architecture:
    """Return the architecture in which a model of ``transformers`` is written.

    Args:
        settings: Content of ``config.json``.

    Raises:
        ConfigurationError: If llama.cpp computes something else, or the model type is not known here.
    """
    name = _ALIASES.get(str(settings.get("model_type")), settings.get("model_type"))
    found = next((one for one in ARCHITECTURES.values() if one.model_type == name), None)
    if found is None:
        known = ", ".join(sorted({one.model_type for one in ARCHITECTURES.values()} | set(_ALIASES)))
        raise ConfigurationError(f"A model of type {name!r} cannot be written as GGUF; {known} can.")
    window, longest = settings.get("sliding_window"), settings.get("max_position_embeddings", 0)
    is_used = bool(window) and window < longest and settings.get("use_sliding_window", True)
    if is_used and "sliding_window" not in found.settings:
        raise ConfigurationError(
            f"sliding_window={window} is shorter than the context of {longest} tokens, and llama.cpp has no window in "
            f"the architecture {found.name!r}. Set it to null in config.json to attend to all tokens instead."
        )
    for key, value in found.fixed(settings).items():
        given = settings.get(key, value)
        if given != value:
            raise ConfigurationError(f"{key}={given!r} cannot be written as GGUF: llama.cpp computes {value!r}.")
    return found


def _llama(settings: Settings) -> Settings:  # noqa: ARG001
    return {"hidden_act": "silu"}


def _gemma(settings: Settings, *, period: int, layers_of_27b: int) -> Settings:
    """Return what llama.cpp has in its code: every ``period``-th layer attends to all tokens.

    The release of 27B is recognised by its depth: it scales queries by the width of the model over its heads.
    """
    is_27b = settings["num_hidden_layers"] == layers_of_27b
    scale = settings["hidden_size"] // settings["num_attention_heads"] if is_27b else settings["head_dim"]
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale,
        "layer_types": [kinds[index % period] for index in range(settings["num_hidden_layers"])],
    }


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture(
            name="llama",
            model_type="llama",
            class_name="LlamaForCausalLM",
            layer=_LLAMA_LAYER,
            settings=_COMMON,
            fixed=_llama,
            interleaved=True,
        ),
        Architecture(
            name="qwen2",
            model_type="qwen2",
            class_name="Qwen2ForCausalLM",
            layer=_LLAMA_LAYER,
            settings=_COMMON,
            fixed=_llama,
        ),
        Architecture(
            name="qwen3",
            model_type="qwen3",
            class_name="Qwen3ForCausalLM",
            layer=_LLAMA_LAYER,
            settings=_COMMON,
            fixed=_llama,
        ),
        Architecture(
            name="gemma2",
            model_type="gemma2",
            class_name="Gemma2ForCausalLM",
            layer=_GEMMA_LAYER,
            settings={
                **_WINDOWED,
                "attn_logit_softcapping": "attn_logit_softcapping",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            fixed=partial(_gemma, period=2, layers_of_27b=46),
            norm_offset=1.0,
            tied=True,
        ),
        Architecture(
            name="gemma3",
            model_type="gemma3_text",
            class_name="Gemma3ForCausalLM",
            layer=_GEMMA_LAYER,
            settings=_WINDOWED,
            fixed=partial(_gemma, period=6, layers_of_27b=62),
            norm_offset=1.0,
            tied=True,
        ),
    )
}
_ALIASES = {"mistral": "llama"}
"""Model types of ``transformers`` that compute what another one does."""

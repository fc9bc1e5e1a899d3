"""The families of ``transformers`` that our parts can express: their ``config.json`` in both directions.

A family is written by reading the parts, and the result is trusted only if reading it back gives the same model. What a
family cannot say is found that way, with its name, and never lost in silence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models.attention import Attention
from lightning_lm.models.ffn import GLU, MLP, Activation
from lightning_lm.models.huggingface.rope_settings import positions_written, read_rope, write_rope
from lightning_lm.models.huggingface.weights import GPT2_NAMES, LLAMA_NAMES, Rename
from lightning_lm.models.init import DepthScaled, Normal
from lightning_lm.models.norms import LayerNorm, RMSNorm
from lightning_lm.models.positions import LearnedPositions
from lightning_lm.models.transformer import Layer, TransformerConfig

__all__ = ["FAMILIES", "Family"]

_Settings = Mapping[str, Any]
_Part = TypeVar("_Part")

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_THEIR_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "relu2": "relu2"}


@dataclass(frozen=True)
class Family:
    """One architecture of ``transformers``.

    Args:
        architecture: Its class.
        prefix: Prefix of its weights' names; missing if only the body was saved.
        names: The table of its weights' names.
        required: Settings that its ``config.json`` must have.
        defaults: Defaults of its configuration class for keys that a ``config.json`` leaves out.
        read: From settings (defaults filled in) to a config.
        write: From a config to settings.
        not_weights: Ends of names in its files that are no weights: tables that are computed.
    """

    architecture: str
    prefix: str
    names: Sequence[Rename]
    required: tuple[str, ...]
    defaults: _Settings
    read: Callable[[_Settings], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    not_weights: tuple[str, ...] = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")

    def config(self, settings: _Settings) -> TransformerConfig:
        """Return the config that settings of this family describe.

        Raises:
            CheckpointError: If a required setting is missing.
            ConfigurationError: If a setting has a value that is not known here.
        """
        missing = [name for name in self.required if settings.get(name) is None]
        if missing:
            raise CheckpointError(f"The config.json lacks {', '.join(missing)}; is it that of a {self.architecture}?")
        return self.read({**self.defaults, **settings})


def _read_gpt2(data: _Settings) -> TransformerConfig:
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
    ffn = MLP(hidden_size=hidden_size, activation=_activation(data["activation_function"]), bias=True)
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
    attention, ffn = _mixer(config.depth_pattern[0]), _expect(MLP, config.depth_pattern[0].ffn, "ffn")
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": attention.num_heads,
        "n_inner": ffn.hidden_size,
        "activation_function": _THEIR_ACTIVATIONS[ffn.activation],
        "scale_attn_weights": attention.scale is None,
        "layer_norm_epsilon": _expect(LayerNorm, config.norm, "norm").eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": attention.dropout,
        "initializer_range": _std(config),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read_llama(data: _Settings) -> TransformerConfig:
    return _llama(data, _attention(data, bias="all" if data["attention_bias"] else "none"), bias=data["mlp_bias"])


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    attention, ffn = _mixer(config.depth_pattern[0]), _expect(GLU, config.depth_pattern[0].ffn, "ffn")
    return _llama_settings(config) | {
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias == "all",
        "mlp_bias": ffn.bias,
    }


def _read_mistral(data: _Settings) -> TransformerConfig:
    return _llama(data, replace(_attention(data), window=data["sliding_window"]))


def _write_mistral(config: TransformerConfig) -> dict[str, Any]:
    attention = _mixer(config.depth_pattern[0])
    return _llama_settings(config) | {"head_dim": attention.head_dim, "sliding_window": attention.window}


def _read_qwen2(data: _Settings) -> TransformerConfig:
    return _qwen(data, _attention(data, bias="qkv"))


def _write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    return _llama_settings(config) | _windows(config)


def _read_qwen3(data: _Settings) -> TransformerConfig:
    attention = _attention(data, bias="all" if data["attention_bias"] else "none")
    return _qwen(data, replace(attention, qk_norm="head"))


def _write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    attention = _mixer(config.depth_pattern[0])
    own = {"head_dim": attention.head_dim, "attention_bias": attention.bias == "all"}
    return _llama_settings(config) | own | _windows(config)


def _attention(data: _Settings, *, bias: Literal["none", "qkv", "all"] = "none") -> Attention:
    """Return what Llama and its descendants share."""
    return Attention(
        num_heads=data["num_attention_heads"],
        num_kv_heads=data["num_key_value_heads"] or data["num_attention_heads"],
        head_dim=data.get("head_dim") or data["hidden_size"] // data["num_attention_heads"],
        rope=read_rope(data),
        dropout=float(data["attention_dropout"] or 0.0),
        bias=bias,
    )


def _llama(data: _Settings, *attention: Attention, bias: bool = False) -> TransformerConfig:
    """Return a config whose layers have these mixers, one after another."""
    ffn = GLU(hidden_size=data["intermediate_size"], activation=_activation(data["hidden_act"]), bias=bias)
    layers = tuple(Layer(mixer=mixer, ffn=ffn) for mixer in attention)
    return TransformerConfig(
        vocab_size=data["vocab_size"],
        context_length=data["max_position_embeddings"],
        d_model=data["hidden_size"],
        num_layers=data["num_hidden_layers"],
        layers=_shortest_cycle(layers),
        norm=RMSNorm(eps=float(data["rms_norm_eps"])),
        tie_embeddings=data["tie_word_embeddings"],
        init=Normal(std=float(data["initializer_range"])),
    )


def _qwen(data: _Settings, attention: Attention) -> TransformerConfig:
    """Return a config in which some layers see a window, as Qwen's settings say."""
    window = data["sliding_window"] if data["use_sliding_window"] else None
    first = data["max_window_layers"]
    kinds = data["layer_types"] or [
        "full_attention" if index < first else "sliding_attention" for index in range(data["num_hidden_layers"])
    ]
    return _llama(data, *(replace(attention, window=window if kind[0] == "s" else None) for kind in kinds))


def _windows(config: TransformerConfig) -> dict[str, Any]:
    """Return Qwen's settings of the layers' windows."""
    windows = [_mixer(layer).window for layer in config.depth_pattern]
    known = {window for window in windows if window is not None}
    return {
        "use_sliding_window": bool(known),
        "sliding_window": max(known, default=None),
        "max_window_layers": config.num_layers if not known else 0,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def _llama_settings(config: TransformerConfig) -> dict[str, Any]:
    """Return what Llama and its descendants share."""
    attention, ffn = _mixer(config.depth_pattern[0]), _expect(GLU, config.depth_pattern[0].ffn, "ffn")
    if attention.rope is None:
        raise ConfigurationError("there are no rotary positions")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": ffn.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "hidden_act": _THEIR_ACTIVATIONS[ffn.activation],
        "max_position_embeddings": positions_written(config.context_length, attention.rope.scaling),
        "rms_norm_eps": _expect(RMSNorm, config.norm, "norm").eps,
        **write_rope(attention.rope),
        "attention_dropout": attention.dropout,
        "initializer_range": _std(config),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _shortest_cycle(layers: tuple[Layer, ...]) -> Layer | tuple[Layer, ...]:
    """Return the fewest layers that give these when they are cycled over the depth."""
    for length in range(1, len(layers)):
        if all(layer == layers[index % length] for index, layer in enumerate(layers)):
            return layers[0] if length == 1 else layers[:length]
    return layers[0] if len(layers) == 1 else layers


def _mixer(layer: Layer) -> Attention:
    return _expect(Attention, layer.mixer, "mixer")


def _expect(kind: type[_Part], part: object, name: str) -> _Part:
    if type(part) is not kind:
        raise ConfigurationError(f"{name} is a {type(part).__name__}, not a {kind.__name__}")
    return part


def _std(config: TransformerConfig) -> float:
    return float(getattr(config.init, "std", None) or 0.02)


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise ConfigurationError(f"The activation {name!r} is not known here; known are {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


_LLAMA_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN_DEFAULTS = _LLAMA_DEFAULTS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
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


def _like_llama(
    architecture: str,
    defaults: _Settings,
    read: Callable[[_Settings], TransformerConfig],
    write: Callable[[TransformerConfig], dict[str, Any]],
) -> Family:
    return Family(architecture, "model.", LLAMA_NAMES, _LLAMA_REQUIRED, defaults, read, write)


FAMILIES: dict[str, Family] = {
    "llama": _like_llama("LlamaForCausalLM", _LLAMA_DEFAULTS, _read_llama, _write_llama),
    "mistral": _like_llama(
        "MistralForCausalLM",
        _LLAMA_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
        _read_mistral,
        _write_mistral,
    ),
    "qwen2": _like_llama("Qwen2ForCausalLM", _QWEN_DEFAULTS, _read_qwen2, _write_qwen2),
    "qwen3": _like_llama("Qwen3ForCausalLM", _QWEN_DEFAULTS | {"head_dim": 128}, _read_qwen3, _write_qwen3),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        names=GPT2_NAMES,
        required=("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"),
        defaults=_GPT2_DEFAULTS,
        read=_read_gpt2,
        write=_write_gpt2,
    ),
}
"""By ``model_type``, the plainest first: a config is exported as the first family that can express it."""

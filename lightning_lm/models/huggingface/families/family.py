"""Common ground of the families: a family itself, and settings that Llama's descendants share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models.attention import Attention
from lightning_lm.models.config import ModelConfig
from lightning_lm.models.ffn import GLU, Activation
from lightning_lm.models.huggingface.renames import Rename, module_names
from lightning_lm.models.huggingface.rope_settings import positions_written, read_rope, write_rope
from lightning_lm.models.init import Normal
from lightning_lm.models.mixer import Mixer
from lightning_lm.models.norms import RMSNorm
from lightning_lm.models.transformer import Layer, TransformerConfig

__all__ = [
    "ACTIVATIONS",
    "LLAMA_DEFAULTS",
    "LLAMA_NAMES",
    "LLAMA_REQUIRED",
    "THEIR_ACTIVATIONS",
    "Family",
    "Settings",
    "activation",
    "attention_of",
    "expect",
    "like_llama",
    "read_attention",
    "read_body",
    "shortest_cycle",
    "std",
    "write_body",
]

Settings = Mapping[str, Any]
_Part = TypeVar("_Part")

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
THEIR_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "relu2": "relu2"}


@dataclass(frozen=True)
class Family:
    """One architecture of ``transformers``.

    Args:
        architecture: Its class.
        prefix: Prefix of its weights' names; missing if only the body was saved.
        names: The table of its weights' names, or a function that makes it for a config.
        required: Settings that its ``config.json`` must have.
        defaults: Defaults of its configuration class for keys that a ``config.json`` leaves out.
        read: From settings (defaults filled in) to a config.
        write: From a config to settings.
        describes: Class of the configs that it writes.
        not_weights: Ends of names in its files that are no weights: tables that are computed.
        predicts_further: Its files may have layers beyond the depth, which predict further tokens; they are not read.
    """

    architecture: str
    prefix: str
    names: Sequence[Rename] | Callable[[Any], Sequence[Rename]]
    required: tuple[str, ...]
    defaults: Settings
    read: Callable[[Settings], Any]
    write: Callable[[Any], dict[str, Any]]
    describes: type[ModelConfig] = TransformerConfig
    not_weights: tuple[str, ...] = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
    predicts_further: bool = False

    def names_for(self, config: Any) -> Sequence[Rename]:
        """Return the table of the weights' names.

        Args:
            config: That of the model; the layouts of some families depend on it.
        """
        return self.names(config) if callable(self.names) else self.names

    def config(self, settings: Settings) -> Any:
        """Return the config that settings of this family describe.

        Raises:
            CheckpointError: If a required setting is missing.
            ConfigurationError: If a setting has a value that is not known here.
        """
        missing = [name for name in self.required if settings.get(name) is None]
        if missing:
            raise CheckpointError(f"The config.json lacks {', '.join(missing)}; is it that of a {self.architecture}?")
        return self.read({**self.defaults, **settings})


def read_attention(data: Settings, *, bias: Literal["none", "qkv", "all"] = "none") -> Attention:
    """Return what Llama and its descendants share."""
    return Attention(
        num_heads=data["num_attention_heads"],
        num_kv_heads=data["num_key_value_heads"] or data["num_attention_heads"],
        head_dim=data.get("head_dim") or data["hidden_size"] // data["num_attention_heads"],
        rope=read_rope(data),
        dropout=float(data["attention_dropout"] or 0.0),
        bias=bias,
    )


def read_body(data: Settings, *attention: Mixer, bias: bool = False) -> TransformerConfig:
    """Return a config whose layers have these mixers, one after another."""
    ffn = GLU(hidden_size=data["intermediate_size"], activation=activation(data["hidden_act"]), bias=bias)
    layers = tuple(Layer(mixer=mixer, ffn=ffn) for mixer in attention)
    return TransformerConfig(
        vocab_size=data["vocab_size"],
        context_length=data["max_position_embeddings"],
        d_model=data["hidden_size"],
        num_layers=data["num_hidden_layers"],
        layers=shortest_cycle(layers),
        norm=RMSNorm(eps=float(data["rms_norm_eps"])),
        tie_embeddings=data["tie_word_embeddings"],
        init=Normal(std=float(data["initializer_range"])),
    )


def write_body(config: TransformerConfig) -> dict[str, Any]:
    """Return what Llama and its descendants share."""
    attention, ffn = attention_of(config.depth_pattern[0]), expect(GLU, config.depth_pattern[0].ffn, "ffn")
    if attention.rope is None:
        raise ConfigurationError("there are no rotary positions")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": ffn.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "hidden_act": THEIR_ACTIVATIONS[ffn.activation],
        "max_position_embeddings": positions_written(config.context_length, attention.rope.scaling),
        "rms_norm_eps": expect(RMSNorm, config.norm, "norm").eps,
        **write_rope(attention.rope),
        "attention_dropout": attention.dropout,
        "initializer_range": std(config),
        "tie_word_embeddings": config.tie_embeddings,
    }


def shortest_cycle(layers: tuple[Layer, ...]) -> Layer | tuple[Layer, ...]:
    """Return the fewest layers that give these when they are cycled over the depth."""
    for length in range(1, len(layers)):
        if all(layer == layers[index % length] for index, layer in enumerate(layers)):
            return layers[0] if length == 1 else layers[:length]
    return layers[0] if len(layers) == 1 else layers


def attention_of(layer: Layer) -> Attention:
    """Return the attention of a layer, or refuse another mixer as `expect` does.

    Args:
        layer: One of a config.
    """
    return expect(Attention, layer.mixer, "mixer")


def expect(kind: type[_Part], part: object, name: str) -> _Part:
    """Return a part of exactly this kind.

    Args:
        kind: Class that the family knows.
        part: Part of the config.
        name: Field of the config, for the error.

    Raises:
        ConfigurationError: If it is of another kind.
    """
    if type(part) is not kind:
        raise ConfigurationError(f"{name} is a {type(part).__name__}, not a {kind.__name__}")
    return part


def std(config: TransformerConfig) -> float:
    """Return the ``initializer_range`` to write.

    Args:
        config: That of the model.
    """
    return float(getattr(config.init, "std", None) or 0.02)


def activation(name: str) -> Activation:
    """Return our name of an activation.

    Args:
        name: Theirs.

    Raises:
        ConfigurationError: If it is not known here.
    """
    if name not in ACTIVATIONS:
        raise ConfigurationError(f"The activation {name!r} is not known here; known are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


LLAMA_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA_DEFAULTS = {
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
LLAMA_NAMES = module_names(
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


def like_llama(
    architecture: str,
    defaults: Settings,
    read: Callable[[Settings], Any],
    write: Callable[[Any], dict[str, Any]],
) -> Family:
    """Return a family whose weights have the names of Llama's.

    Args:
        architecture: Class of ``transformers``.
        defaults: See `Family`.
        read: See `Family`.
        write: See `Family`.
    """
    return Family(architecture, "model.", LLAMA_NAMES, LLAMA_REQUIRED, defaults, read, write)

"""BERT and ModernBERT, with the head that predicts hidden tokens."""

from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.attention import Attention
from lightning_lm.models.encoder import EncoderConfig, PredictionHead
from lightning_lm.models.ffn import GLU, MLP
from lightning_lm.models.huggingface.families.family import (
    THEIR_ACTIVATIONS,
    Family,
    Settings,
    activation,
    attention_of,
    expect,
    shortest_cycle,
    std,
)
from lightning_lm.models.huggingface.renames import Rename, module_names
from lightning_lm.models.init import Normal
from lightning_lm.models.norms import LayerNorm
from lightning_lm.models.positions import LearnedPositions, Rope
from lightning_lm.models.transformer import Layer, TransformerConfig

__all__ = ["BERT", "MODERNBERT"]


def _read_bert(data: Settings) -> EncoderConfig:
    kind = data["position_embedding_type"]
    if kind != "absolute" or data["is_decoder"]:
        raise ConfigurationError(
            f"position_embedding_type={kind!r} with is_decoder={data['is_decoder']} of this BERT is not known here; "
            "only absolute positions of an encoder are."
        )
    if not data["tie_word_embeddings"]:
        raise ConfigurationError(
            "tie_word_embeddings=false of this BERT is not known here: its files then have two biases of the output "
            "layer, of which only one is used. Tie them, or take ModernBERT."
        )
    act = activation(data["hidden_act"])
    attention = Attention(
        num_heads=data["num_attention_heads"],
        rope=None,
        bias="all",
        causal=False,
        dropout=float(data["attention_probs_dropout_prob"]),
    )
    return EncoderConfig(
        vocab_size=data["vocab_size"],
        context_length=data["max_position_embeddings"],
        d_model=data["hidden_size"],
        num_layers=data["num_hidden_layers"],
        layers=Layer(mixer=attention, ffn=MLP(hidden_size=data["intermediate_size"], activation=act, bias=True)),
        norm=LayerNorm(eps=float(data["layer_norm_eps"])),
        residual="post",
        positions=LearnedPositions(),
        tie_embeddings=data["tie_word_embeddings"],
        final_norm=False,
        dropout=float(data["hidden_dropout_prob"]),
        init=Normal(std=float(data["initializer_range"])),
        token_types=data["type_vocab_size"],
        embedding_norm=True,
        prediction=PredictionHead(activation=act),
    )


def _write_bert(config: TransformerConfig) -> dict[str, Any]:
    encoder = expect(EncoderConfig, config, "encoder")
    attention, ffn = attention_of(config.depth_pattern[0]), expect(MLP, config.depth_pattern[0].ffn, "ffn")
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "intermediate_size": ffn.hidden_size,
        "hidden_act": THEIR_ACTIVATIONS[ffn.activation],
        "layer_norm_eps": expect(LayerNorm, config.norm, "norm").eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": attention.dropout,
        "type_vocab_size": encoder.token_types,
        "initializer_range": std(config),
        "tie_word_embeddings": config.tie_embeddings,
    }


_BERT_NAMES = (
    *module_names(
        {
            "bert.embeddings.word_embeddings": "embed",
            "bert.embeddings.position_embeddings": "positions",
            "bert.embeddings.token_type_embeddings": "token_types",
            "bert.embeddings.LayerNorm": "embedding_norm",
            "bert.encoder.layer.{i}.attention.self.query": "layers.{i}.mixer.q",
            "bert.encoder.layer.{i}.attention.self.key": "layers.{i}.mixer.k",
            "bert.encoder.layer.{i}.attention.self.value": "layers.{i}.mixer.v",
            "bert.encoder.layer.{i}.attention.output.dense": "layers.{i}.mixer.o",
            "bert.encoder.layer.{i}.attention.output.LayerNorm": "layers.{i}.mixer_norm",
            "bert.encoder.layer.{i}.intermediate.dense": "layers.{i}.ffn.up",
            "bert.encoder.layer.{i}.output.dense": "layers.{i}.ffn.down",
            "bert.encoder.layer.{i}.output.LayerNorm": "layers.{i}.ffn_norm",
            "cls.predictions.transform.dense": "prediction.dense",
            "cls.predictions.transform.LayerNorm": "prediction.norm",
        }
    ),
    Rename("cls.predictions.bias", ("head.bias",)),
    Rename("cls.predictions.decoder.weight", ("head.weight",)),
)

BERT = Family(
    architecture="BertForMaskedLM",
    prefix="bert.",
    names=_BERT_NAMES,
    required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    defaults={
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "tie_word_embeddings": True,
    },
    read=_read_bert,
    write=_write_bert,
    describes=EncoderConfig,
    not_weights=(
        "embeddings.position_ids",
        "pooler.dense.weight",
        "pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    ),
)


def _theta(data: Settings, kind: str) -> float:
    given = (data["rope_parameters"] or {}).get(kind) or {}
    if given.get("rope_type", "default") != "default":
        raise ConfigurationError(f"rope_type={given['rope_type']!r} of this ModernBERT is not known here.")
    old = {"full_attention": data["global_rope_theta"], "sliding_attention": data["local_rope_theta"]}
    return float(given.get("rope_theta") or old[kind])


def _read_modernbert(data: Settings) -> EncoderConfig:
    act, bias = activation(data["hidden_activation"]), bool(data["mlp_bias"])
    if data["attention_bias"] or data["embedding_dropout"] != data["mlp_dropout"]:
        raise ConfigurationError("Biases of attention and unequal dropouts of this ModernBERT are not known here.")
    every, depth = data["global_attn_every_n_layers"], data["num_hidden_layers"]
    kinds = data["layer_types"] or ["sliding_attention" if i % every else "full_attention" for i in range(depth)]
    half = data["local_attention"] // 2
    if data.get("sliding_window") not in (None, half):
        raise ConfigurationError(
            f"sliding_window={data['sliding_window']} of this ModernBERT is not half of "
            f"local_attention={data['local_attention']}; leave it out, or change one."
        )
    ffn = GLU(hidden_size=data["intermediate_size"], activation=act, bias=bias)

    def layer(kind: str) -> Layer:
        rope, window = Rope(base=_theta(data, kind)), half + 1 if kind == "sliding_attention" else None
        heads, dropout = data["num_attention_heads"], float(data["attention_dropout"])
        return Layer(mixer=Attention(num_heads=heads, rope=rope, window=window, causal=False, dropout=dropout), ffn=ffn)

    return EncoderConfig(
        vocab_size=data["vocab_size"],
        context_length=data["max_position_embeddings"],
        d_model=data["hidden_size"],
        num_layers=depth,
        layers=shortest_cycle(tuple(layer(kind) for kind in kinds)),
        norm=LayerNorm(eps=float(data["norm_eps"]), bias=bool(data["norm_bias"])),
        tie_embeddings=data["tie_word_embeddings"],
        dropout=float(data["mlp_dropout"]),
        init=Normal(std=float(data["initializer_range"])),
        embedding_norm=True,
        prediction=PredictionHead(
            activation=activation(data["classifier_activation"]),
            bias=bool(data["classifier_bias"]),
            output_bias=bool(data["decoder_bias"]),
        ),
    )


def _write_modernbert(config: TransformerConfig) -> dict[str, Any]:
    encoder = expect(EncoderConfig, config, "encoder")
    prediction, layers = expect(PredictionHead, encoder.prediction, "prediction"), config.depth_pattern
    mixers, ffn = [attention_of(layer) for layer in layers], expect(GLU, layers[0].ffn, "ffn")
    local = [mixer for mixer in mixers if mixer.window is not None]
    whole = [mixer for mixer in mixers if mixer.window is None]
    bases = [expect(Rope, group[0].rope, "rope").base if group else 10_000.0 for group in (whole, local)]
    norm = expect(LayerNorm, config.norm, "norm")
    ropes = ({"rope_type": "default", "rope_theta": base} for base in bases)
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixers[0].num_heads,
        "intermediate_size": ffn.hidden_size,
        "hidden_activation": THEIR_ACTIVATIONS[ffn.activation],
        "classifier_activation": THEIR_ACTIVATIONS[prediction.activation],
        "classifier_bias": prediction.bias,
        "decoder_bias": prediction.output_bias,
        "norm_eps": norm.eps,
        "norm_bias": norm.bias,
        "mlp_bias": ffn.bias,
        "mlp_dropout": config.dropout,
        "embedding_dropout": config.dropout,
        "attention_dropout": mixers[0].dropout,
        "layer_types": ["full_attention" if mixer.window is None else "sliding_attention" for mixer in mixers],
        "local_attention": 2 * ((local[0].window or 1) - 1) if local else 128,
        "rope_parameters": dict(zip(("full_attention", "sliding_attention"), ropes, strict=True)),
        "initializer_range": std(config),
        "tie_word_embeddings": config.tie_embeddings,
    }


MODERNBERT = Family(
    architecture="ModernBertForMaskedLM",
    prefix="model.",
    names=(
        *module_names(
            {
                "model.embeddings.tok_embeddings": "embed",
                "model.embeddings.norm": "embedding_norm",
                "model.layers.{i}.attn_norm": "layers.{i}.mixer_norm",
                "model.layers.{i}.attn.Wqkv": "layers.{i}.mixer.q layers.{i}.mixer.k layers.{i}.mixer.v",
                "model.layers.{i}.attn.Wo": "layers.{i}.mixer.o",
                "model.layers.{i}.mlp_norm": "layers.{i}.ffn_norm",
                "model.layers.{i}.mlp.Wi": "layers.{i}.ffn.gate layers.{i}.ffn.up",
                "model.layers.{i}.mlp.Wo": "layers.{i}.ffn.down",
                "model.final_norm": "norm",
                "head.dense": "prediction.dense",
                "head.norm": "prediction.norm",
            }
        ),
        Rename("decoder.bias", ("head.bias",)),
        Rename("decoder.weight", ("head.weight",)),
    ),
    required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    defaults={
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "classifier_bias": False,
        "decoder_bias": True,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "mlp_dropout": 0.0,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_types": None,
        "global_attn_every_n_layers": 3,
        "local_attention": 128,
        "rope_parameters": None,
        "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
    read=_read_modernbert,
    write=_write_modernbert,
    describes=EncoderConfig,
    not_weights=("decoder.weight", ".inv_freq"),
)

"""T5, versions 1.0 (ReLU, tied, scaled output) and 1.1 (gated, untied)."""

from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.attention import Attention
from lightning_lm.models.cross_attention import CrossAttention
from lightning_lm.models.encoder_decoder import EncoderDecoderConfig, decoder_layers
from lightning_lm.models.ffn import FFN, GLU, MLP
from lightning_lm.models.huggingface.families.family import (
    THEIR_ACTIVATIONS,
    Family,
    Settings,
    activation,
    attention_of,
    expect,
)
from lightning_lm.models.huggingface.renames import Rename, module_names
from lightning_lm.models.norms import RMSNorm
from lightning_lm.models.position_bias import RelativeBias
from lightning_lm.models.transformer import Layer, TransformerConfig

__all__ = ["T5"]


def _read_t5(data: Settings) -> EncoderDecoderConfig:
    kind, _, name = data["feed_forward_proj"].rpartition("-")
    if kind not in ("", "gated"):
        raise ConfigurationError(f"feed_forward_proj={data['feed_forward_proj']!r} of this T5 is not known here.")
    theirs = "gelu_new" if (kind, name) == ("gated", "gelu") else name
    for key, known in (("is_encoder_decoder", True), ("is_gated_act", bool(kind)), ("dense_act_fn", theirs)):
        if data.get(key) not in (None, known):
            raise ConfigurationError(
                f"{key}={data[key]!r} of this T5 does not fit feed_forward_proj={data['feed_forward_proj']!r} of an "
                f"encoder-decoder; only {known!r} does."
            )
    act = "gelu_tanh" if (kind, name) == ("gated", "gelu") else activation(name)
    ffn: FFN = (GLU if kind else MLP)(hidden_size=data["d_ff"], activation=act)
    heads, size, dropout = data["num_heads"], data["d_kv"], float(data["dropout_rate"])
    both = Attention(num_heads=heads, head_dim=size, rope=None, scale=1.0, causal=False, dropout=dropout)
    causal = Attention(num_heads=heads, head_dim=size, rope=None, scale=1.0, dropout=dropout)
    cross = CrossAttention(num_heads=heads, head_dim=size, scale=1.0, dropout=dropout)

    def part(depth: int, layers: Layer | tuple[Layer, ...], *, bidirectional: bool) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=data["vocab_size"],
            context_length=data["n_positions"],
            d_model=data["d_model"],
            num_layers=depth,
            layers=layers,
            norm=RMSNorm(eps=float(data["layer_norm_epsilon"])),
            positions=RelativeBias(
                heads,
                num_buckets=data["relative_attention_num_buckets"],
                max_distance=data["relative_attention_max_distance"],
                bidirectional=bidirectional,
            ),
            tie_embeddings=data["tie_word_embeddings"] and not bidirectional,
            dropout=dropout,
        )

    scaled = data["scale_decoder_outputs"]
    scaled = data["tie_word_embeddings"] if scaled is None else scaled
    return EncoderDecoderConfig(
        vocab_size=data["vocab_size"],
        context_length=data["n_positions"],
        encoder=part(data["num_layers"], Layer(mixer=both, ffn=ffn), bidirectional=True),
        decoder=part(
            2 * (data["num_decoder_layers"] or data["num_layers"]),
            decoder_layers(attention=causal, cross=cross, ffn=ffn),
            bidirectional=False,
        ),
        output_scale=data["d_model"] ** -0.5 if scaled else None,
    )


def _write_t5(config: Any) -> dict[str, Any]:
    model = expect(EncoderDecoderConfig, config, "encoder and decoder")
    encoder, decoder = model.encoder, model.decoder
    layer = encoder.depth_pattern[0]
    attention, bias = attention_of(layer), expect(RelativeBias, encoder.positions, "positions")
    ffn = layer.ffn
    if isinstance(ffn, GLU):
        proj = "gated-gelu" if ffn.activation == "gelu_tanh" else f"gated-{THEIR_ACTIVATIONS[ffn.activation]}"
    else:
        proj = THEIR_ACTIVATIONS[expect(MLP, ffn, "ffn").activation]
    return {
        "is_encoder_decoder": True,
        "vocab_size": model.vocab_size,
        "n_positions": model.context_length,
        "d_model": encoder.d_model,
        "d_kv": attention.head_dim,
        "d_ff": getattr(ffn, "hidden_size", None),
        "num_heads": attention.num_heads,
        "num_layers": encoder.num_layers,
        "num_decoder_layers": decoder.num_layers // 2,
        "relative_attention_num_buckets": bias.num_buckets,
        "relative_attention_max_distance": bias.max_distance,
        "layer_norm_epsilon": expect(RMSNorm, encoder.norm, "norm").eps,
        "feed_forward_proj": proj,
        "dropout_rate": encoder.dropout,
        "tie_word_embeddings": decoder.tie_embeddings,
        "scale_decoder_outputs": model.output_scale is not None,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def _attention(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{name}": f"{ours}.{name}" for name in "qkvo"}


def _feed_forward(theirs: str, ours: str) -> dict[str, str]:
    pairs = {"wi": "up", "wi_0": "gate", "wi_1": "up", "wo": "down"}
    return {f"{theirs}.{name}": f"{ours}.{part}" for name, part in pairs.items()}


def _names(config: Any) -> tuple[Rename, ...]:
    names = {"shared": "decoder.embed", "lm_head": "decoder.head"}
    for part in ("encoder", "decoder"):
        bias = f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias"
        names |= {f"{part}.final_layer_norm": f"{part}.norm", bias: f"{part}.positions"}
    for index in range(config.encoder.num_layers):
        block, layer = f"encoder.block.{index}.layer", f"encoder.layers.{index}"
        names |= _attention(f"{block}.0.SelfAttention", f"{layer}.mixer")
        names |= _feed_forward(f"{block}.1.DenseReluDense", f"{layer}.ffn")
        names |= {f"{block}.0.layer_norm": f"{layer}.mixer_norm", f"{block}.1.layer_norm": f"{layer}.ffn_norm"}
    for index in range(config.decoder.num_layers // 2):
        block, mixes, reads = f"decoder.block.{index}.layer", 2 * index, 2 * index + 1
        names |= _attention(f"{block}.0.SelfAttention", f"decoder.layers.{mixes}.mixer")
        names |= _attention(f"{block}.1.EncDecAttention", f"decoder.layers.{reads}.mixer")
        names |= _feed_forward(f"{block}.2.DenseReluDense", f"decoder.layers.{reads}.ffn")
        names |= {
            f"{block}.0.layer_norm": f"decoder.layers.{mixes}.mixer_norm",
            f"{block}.1.layer_norm": f"decoder.layers.{reads}.mixer_norm",
            f"{block}.2.layer_norm": f"decoder.layers.{reads}.ffn_norm",
        }
    gated = isinstance(config.encoder.depth_pattern[0].ffn, GLU)
    unused = ".wi" if gated else ".wi_1"
    return module_names({theirs: ours for theirs, ours in names.items() if not theirs.endswith(unused)})


T5 = Family(
    architecture="T5ForConditionalGeneration",
    prefix="",
    names=_names,
    required=("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    defaults={
        "n_positions": 512,
        "num_decoder_layers": None,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "dropout_rate": 0.1,
        "tie_word_embeddings": True,
        "scale_decoder_outputs": None,
    },
    read=_read_t5,
    write=_write_t5,
    describes=EncoderDecoderConfig,
    not_weights=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
)

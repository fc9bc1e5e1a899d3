"""Published architectures as functions: ``llama3("1B").build()`` has the shapes of the release, with new weights.

Each returns an ordinary `TransformerConfig`, so what should differ is a ``dataclasses.replace`` away. The weights of a
release are read by `lightning_lm.models.load_huggingface`, which follows the release's own ``config.json``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.attention import Attention
from lightning_lm.models.ffn import GLU, MLP
from lightning_lm.models.init import DepthScaled, TruncatedNormal
from lightning_lm.models.norms import LayerNorm, RMSNorm
from lightning_lm.models.positions import LearnedPositions, Llama3Scaling, Rope
from lightning_lm.models.transformer import Layer, TransformerConfig

__all__ = ["gpt2", "llama2", "llama3", "mistral", "qwen2", "qwen3", "tinystories"]


@dataclass(frozen=True)
class _Shape:
    d_model: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    tied: bool = False


_GPT2 = {
    "124M": _Shape(768, 3072, 12, 12),
    "355M": _Shape(1024, 4096, 24, 16),
    "774M": _Shape(1280, 5120, 36, 20),
    "1.5B": _Shape(1600, 6400, 48, 25),
}
_LLAMA2 = {
    "7B": _Shape(4096, 11008, 32, 32),
    "13B": _Shape(5120, 13824, 40, 40),
    "70B": _Shape(8192, 28672, 80, 64, 8),
}
_LLAMA3 = {
    "1B": _Shape(2048, 8192, 16, 32, 8, tied=True),
    "3B": _Shape(3072, 8192, 28, 24, 8, tied=True),
    "8B": _Shape(4096, 14336, 32, 32, 8),
    "70B": _Shape(8192, 28672, 80, 64, 8),
}
_MISTRAL = {"7B": _Shape(4096, 14336, 32, 32, 8)}
_QWEN2 = {
    "0.5B": _Shape(896, 4864, 24, 14, 2, tied=True),
    "1.5B": _Shape(1536, 8960, 28, 12, 2, tied=True),
    "7B": _Shape(3584, 18944, 28, 28, 4),
    "72B": _Shape(8192, 29568, 80, 64, 8),
}
_QWEN3 = {
    "0.6B": _Shape(1024, 3072, 28, 16, 8, tied=True),
    "1.7B": _Shape(2048, 6144, 28, 16, 8, tied=True),
    "4B": _Shape(2560, 9728, 36, 32, 8, tied=True),
    "8B": _Shape(4096, 12288, 36, 32, 8),
    "14B": _Shape(5120, 17408, 40, 40, 8),
    "32B": _Shape(5120, 25600, 64, 64, 8),
}
_TINYSTORIES = {"17M": _Shape(512, 1344, 4, 16)}


def gpt2(
    size: str = "124M", *, vocab_size: int | None = 50_257, context_length: int = 1024, dropout: float = 0.0
) -> TransformerConfig:
    """Return GPT-2: layer norm, learned positions, GELU, biases, tied embeddings.

    Args:
        size: ``124M``, ``355M``, ``774M`` or ``1.5B``.
        vocab_size: Number of token ids; ``None`` to take it from the tokenizer.
        context_length: Rows of learned positions, in tokens.
        dropout: Everywhere but on attention weights; the release was trained with 0.1.

    Raises:
        ConfigurationError: If there is no such size.

    Source:
        Radford et al. 2019, table 2.
    """
    shape = _pick("gpt2", _GPT2, size)
    return TransformerConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        d_model=shape.d_model,
        num_layers=shape.num_layers,
        layers=Layer(
            mixer=Attention(num_heads=shape.num_heads, rope=None, bias="all"),
            ffn=MLP(hidden_size=shape.hidden_size, activation="gelu_tanh", bias=True),
        ),
        norm=LayerNorm(eps=1e-5),
        positions=LearnedPositions(),
        tie_embeddings=True,
        dropout=dropout,
        init=DepthScaled(std=0.02),
    )


def llama2(size: str = "7B", *, vocab_size: int | None = 32_000, context_length: int = 4096) -> TransformerConfig:
    """Return Llama 2.

    Args:
        size: ``7B``, ``13B`` or ``70B``.
        vocab_size: Number of token ids; ``None`` to take it from the tokenizer.
        context_length: Tokens of a training row.

    Raises:
        ConfigurationError: If there is no such size.

    Source:
        Touvron et al. 2023, arXiv:2307.09288, section 2.2.
    """
    shape = _pick("llama2", _LLAMA2, size)
    return _llama(shape, _attention(shape), vocab_size=vocab_size, context_length=context_length)


def llama3(
    size: str = "8B", *, vocab_size: int | None = 128_256, context_length: int | None = None
) -> TransformerConfig:
    """Return Llama 3 (``8B``, ``70B``), or Llama 3.2 with its scaled rotary positions (``1B``, ``3B``).

    Args:
        size: ``1B``, ``3B``, ``8B`` or ``70B``.
        vocab_size: Number of token ids; ``None`` to take it from the tokenizer.
        context_length: Tokens of a training row; ``None`` for the release's 8,192 (3) or 131,072 (3.2).

    Raises:
        ConfigurationError: If there is no such size.

    Source:
        Grattafiori et al. 2024, arXiv:2407.21783, table 3; Llama 3.2 model card.
    """
    shape = _pick("llama3", _LLAMA3, size)
    scaling = Llama3Scaling(factor=32.0, original_context_length=8192) if shape.tied else None
    attention = _attention(shape, Rope(base=500_000.0, scaling=scaling))
    context_length = context_length or (131_072 if scaling else 8192)
    return _llama(shape, attention, vocab_size=vocab_size, context_length=context_length)


def mistral(
    size: str = "7B", *, vocab_size: int | None = 32_000, context_length: int = 32_768, window: int | None = 4096
) -> TransformerConfig:
    """Return Mistral 7B v0.1, whose attention sees a window.

    Args:
        size: ``7B``.
        vocab_size: Number of token ids; ``None`` to take it from the tokenizer.
        context_length: Tokens of a training row.
        window: Tokens a query sees, itself included; ``None`` for all.

    Raises:
        ConfigurationError: If there is no such size.

    Source:
        Jiang et al. 2023, arXiv:2310.06825, table 1.
    """
    shape = _pick("mistral", _MISTRAL, size)
    return _llama(shape, _attention(shape, window=window), vocab_size=vocab_size, context_length=context_length)


def qwen2(size: str = "0.5B", *, vocab_size: int | None = 151_936, context_length: int = 32_768) -> TransformerConfig:
    """Return Qwen2 (and Qwen2.5, which has the same shapes): Llama with biases on queries, keys and values.

    Args:
        size: ``0.5B``, ``1.5B``, ``7B`` or ``72B``.
        vocab_size: Number of token ids; ``None`` to take it from the tokenizer. The release pads it to 152,064 from 7B
            on.
        context_length: Tokens of a training row.

    Raises:
        ConfigurationError: If there is no such size.

    Source:
        Yang et al. 2024, arXiv:2407.10671, table 1.
    """
    shape = _pick("qwen2", _QWEN2, size)
    attention = _attention(shape, Rope(base=1_000_000.0), bias="qkv")
    return _llama(shape, attention, vocab_size=vocab_size, context_length=context_length, eps=1e-6)


def qwen3(size: str = "0.6B", *, vocab_size: int | None = 151_936, context_length: int = 32_768) -> TransformerConfig:
    """Return Qwen3's dense models: Llama with heads of 128 features, and queries and keys normalised.

    Args:
        size: ``0.6B``, ``1.7B``, ``4B``, ``8B``, ``14B`` or ``32B``.
        vocab_size: Number of token ids; ``None`` to take it from the tokenizer.
        context_length: Tokens of a training row.

    Raises:
        ConfigurationError: If there is no such size.

    Source:
        Yang et al. 2025, arXiv:2505.09388, table 1.
    """
    shape = _pick("qwen3", _QWEN3, size)
    attention = _attention(shape, Rope(base=1_000_000.0), head_dim=128, qk_norm="head")
    return _llama(shape, attention, vocab_size=vocab_size, context_length=context_length, eps=1e-6)


def tinystories(size: str = "17M", *, vocab_size: int | None = 10_000, context_length: int = 256) -> TransformerConfig:
    """Return the model of Stanford's CS336, assignment 1: 17M parameters besides the embedding.

    Args:
        size: ``17M``.
        vocab_size: Number of token ids; ``None`` to take it from the tokenizer.
        context_length: Tokens of a training row.

    Raises:
        ConfigurationError: If there is no such size.

    Source:
        CS336 (2025), assignment 1, section 7.2.
    """
    shape = _pick("tinystories", _TINYSTORIES, size)
    config = _llama(shape, _attention(shape), vocab_size=vocab_size, context_length=context_length)
    return replace(config, init=TruncatedNormal())


def _pick(family: str, sizes: Mapping[str, _Shape], size: str) -> _Shape:
    if size not in sizes:
        raise ConfigurationError(f"There is no {family}({size!r}); the sizes are {', '.join(sizes)}.")
    return sizes[size]


def _attention(shape: _Shape, rope: Rope | None = None, **settings: Any) -> Attention:
    return Attention(num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, rope=rope or Rope(), **settings)


def _llama(
    shape: _Shape, attention: Attention, *, vocab_size: int | None, context_length: int, eps: float = 1e-5
) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        d_model=shape.d_model,
        num_layers=shape.num_layers,
        layers=Layer(mixer=attention, ffn=GLU(hidden_size=shape.hidden_size)),
        norm=RMSNorm(eps=eps),
        tie_embeddings=shape.tied,
    )

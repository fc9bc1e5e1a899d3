"""Configuration of a model. A variant is a new part, never a new field, and nothing depends on a model's name."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.attention import Attention, Mixer
from lightning_lm.models.ffn import FFN, GLU
from lightning_lm.models.init import Init, Normal
from lightning_lm.models.norms import Norm, RMSNorm
from lightning_lm.models.positions import Positions
from lightning_lm.parts import Limit, Part

if TYPE_CHECKING:
    from lightning_lm.models.transformer import Transformer

__all__ = ["Layer", "ModelConfig", "Residual", "TransformerConfig"]

Residual = Literal["pre", "post", "sandwich", "reordered", "parallel"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Part, limits={"vocab_size": Limit.COUNT}):
    """Base of the models that a config can name.

    Args:
        vocab_size: Number of token ids; ``None`` to take it from the tokenizer.
        context_length: Tokens of a training row, and how far generation goes unless told otherwise.
    """

    vocab_size: int | None = None
    context_length: int = 1024

    def build(self, vocab_size: int | None = None) -> nn.Module:
        """Return the model.

        Args:
            vocab_size: That of the tokenizer, for a config that leaves its own out.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Layer(Part):
    """One layer: tokens are mixed, then each is transformed by itself.

    Args:
        mixer: Carries information from token to token.
        ffn: Transforms each token; ``None`` for a layer without.
    """

    mixer: Mixer = Attention()
    ffn: FFN | None = GLU()


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(
    ModelConfig,
    limits={"context_length": Limit.COUNT, "logit_softcap": Limit.POSITIVE, "dropout": Limit.BELOW_ONE},
):
    """A decoder-only transformer. The defaults are Llama's.

    Args:
        vocab_size: Number of token ids; ``None`` to take it from the tokenizer.
        context_length: Rows of learned positions, and how far generation goes unless told otherwise. Rotary models can
            read further.
        d_model: Features of the residual stream.
        num_layers: Depth.
        layers: Composition of a layer. A tuple is cycled over the depth.
        norm: Normalisation, everywhere.
        residual: Connection of a sublayer ``f`` to the residual stream ``x``. ``pre``: ``x + f(norm(x))``; ``post``:
            ``norm(x + f(x))``; ``sandwich``: ``x + norm(f(norm(x)))``; ``reordered``: ``x + norm(f(x))``;
            ``parallel``: both sublayers read the same input, ``x + mixer(norm(x)) + ffn(norm(x))``.
        positions: Absolute positions added to the embeddings; rotary ones belong to the attention.
        tie_embeddings: Share the head's weight with the embedding.
        embed_scale: Multiplies the embeddings (Gemma: ``sqrt(d_model)``).
        final_norm: Normalise the residual stream before the head.
        logit_softcap: Logits are squeezed to ``logit_softcap * tanh(logit / logit_softcap)``.
        dropout: Probability with which a feature of the embeddings or of a sublayer's output is dropped in training.
        init: Initial weights.

    Source:
        Pre-norm: Xiong et al. 2020, arXiv:2002.04745; post-norm: Vaswani et al. 2017; sandwich: Gemma 2,
        arXiv:2408.00118; reordered: OLMo 2, arXiv:2501.00656, section 3.2; parallel: GPT-J and PaLM, arXiv:2204.02311.
    """

    d_model: int
    num_layers: int
    layers: Layer | tuple[Layer, ...] = Layer()
    norm: Norm = RMSNorm()
    residual: Residual = "pre"
    positions: Positions | None = None
    tie_embeddings: bool = False
    embed_scale: float | None = None
    final_norm: bool = True
    logit_softcap: float | None = None
    dropout: float = 0.0
    init: Init = Normal()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d_model", "num_layers", "context_length"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} is too small; use at least 1.")
        if not self.layers:
            raise ConfigurationError("layers is empty; give one Layer, or a tuple of them to cycle over the depth.")

    @property
    def depth_pattern(self) -> tuple[Layer, ...]:
        """The description of each of the ``num_layers`` layers, in order."""
        cycle = (self.layers,) if isinstance(self.layers, Layer) else self.layers
        return tuple(cycle[index % len(cycle)] for index in range(self.num_layers))

    def build(self, vocab_size: int | None = None) -> "Transformer":
        """Return the model, with initial weights unless it is made on the meta device.

        Args:
            vocab_size: That of the tokenizer, for a config that leaves its own out.

        Raises:
            ConfigurationError: If neither says how large the vocabulary is, or the config's is too small.
        """
        from lightning_lm.models.transformer import Transformer

        size = self.vocab_size or vocab_size
        if size is None:
            raise ConfigurationError("vocab_size is not known. Set it in the config, or pass the tokenizer's.")
        if vocab_size is not None and size < vocab_size:
            raise ConfigurationError(
                f"The config has vocab_size={size}, but the tokenizer has {vocab_size} ids. Leave it out, or set at "
                f"least {vocab_size}."
            )
        return Transformer(dataclasses.replace(self, vocab_size=size))

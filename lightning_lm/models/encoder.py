"""Encoders: transformers that read in both directions, with token types, a norm of the embeddings, a prediction head.

Devlin et al. 2019, arXiv:1810.04805 (BERT); Warner et al. 2024, arXiv:2412.13663 (ModernBERT). `Encoder.encode` returns
the features of each token; `Encoder.hidden` applies the prediction head's transform, so that the losses of language
models, which need ``hidden`` and ``head``, work as they are.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.attention import Documents
from lightning_lm.models.attention import Attention
from lightning_lm.models.cache import KVCache
from lightning_lm.models.config import with_vocabulary
from lightning_lm.models.context import Context, make_context
from lightning_lm.models.ffn import ACTIVATIONS, Activation
from lightning_lm.models.norms import Norm
from lightning_lm.models.roles import with_role
from lightning_lm.models.transformer import Layer, Transformer, TransformerConfig
from lightning_lm.parts import Limit, Part

__all__ = ["Encoder", "EncoderConfig", "PredictionHead", "PredictionTransform"]


@dataclass(frozen=True, kw_only=True)
class PredictionHead(Part):
    """Transform of the features before hidden tokens are predicted: a linear layer, an activation, the model's norm.

    Args:
        activation: Name of the activation.
        bias: Give the linear layer a bias.
        output_bias: Add a bias to the logits.
    """

    activation: Activation = "gelu"
    bias: bool = True
    output_bias: bool = True

    def build(self, d_model: int, *, norm: Norm) -> nn.Module:
        """Return the transform.

        Args:
            d_model: Features of the residual stream.
            norm: The model's normalisation.
        """
        return PredictionTransform(self, d_model, norm=norm)


class PredictionTransform(nn.Module):
    """``norm(activation(dense(x)))``.

    Args:
        part: The description.
        d_model: Features of the residual stream.
        norm: The model's normalisation.
    """

    parallel_plan: ClassVar = {"dense": "gather", "norm": "norm"}

    def __init__(self, part: PredictionHead, d_model: int, *, norm: Norm) -> None:
        super().__init__()
        self.dense = nn.Linear(d_model, d_model, bias=part.bias)
        self.activation = ACTIVATIONS[part.activation]
        self.norm = norm.build(d_model)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Transform each token by itself."""
        return cast(Tensor, self.norm(self.activation(self.dense(x))))


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(TransformerConfig, limits={"token_types": Limit.NON_NEGATIVE}):
    """A transformer that reads in both directions. The fields are those of `TransformerConfig`, and these.

    Args:
        layers: Composition of a layer. A tuple is cycled over the depth.
        token_types: Number of segments whose learned vectors are added to the embeddings; 0 for none.
        embedding_norm: Normalise the embeddings. In a pre-norm model the first mixer then has no norm of its own.
        prediction: Transform before the output layer; ``None`` for none.
    """

    layers: Layer | tuple[Layer, ...] = Layer(mixer=Attention(causal=False))
    token_types: int = 0
    embedding_norm: bool = False
    prediction: PredictionHead | None = None

    def build(self, vocab_size: int | None = None) -> "Encoder":
        """Return the model, with initial weights unless it is made on the meta device.

        Args:
            vocab_size: That of the tokenizer, for a config that leaves its own out.
        """
        return Encoder(with_vocabulary(self, vocab_size))


class Encoder(Transformer):
    """A language model that predicts tokens from both sides.

    Args:
        config: Configuration; its ``vocab_size`` must be known.
    """

    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        d_model = config.d_model
        self.token_types = (
            with_role(nn.Embedding(config.token_types, d_model), "embedding") if config.token_types else None
        )
        self.embedding_norm = config.norm.build(d_model) if config.embedding_norm else None
        if config.embedding_norm and config.residual == "pre":
            self.layers[0].mixer_norm = nn.Identity()
        self.prediction = None if config.prediction is None else config.prediction.build(d_model, norm=config.norm)
        if config.prediction is not None and config.prediction.output_bias:
            self.head.bias = nn.Parameter(torch.empty(len(self.head.weight), device=self.head.weight.device))
        if not self.embed.weight.is_meta:
            self.init_weights()

    def encode(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | Documents | None = None,
        token_type_ids: Int[Tensor, "batch seq"] | None = None,
        counted: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the features of each token, before the prediction head.

        Args:
            input_ids: Tokens.
            position_ids: Place of each token in its document; counted by default.
            document_ids: Equal inside a document; no token sees another document's. Padding is a document of its own.
            token_type_ids: Segment of each token; the first by default.
            counted: Tokens that count for the loads of experts and auxiliary losses; by default all.
        """
        context = make_context(input_ids, position_ids, document_ids, None)
        context.token_type_ids, context.counted = token_type_ids, counted
        return self.finish(self.run(input_ids, context))

    def hidden(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | Documents | None = None,
        token_type_ids: Int[Tensor, "batch seq"] | None = None,
        prefix_lengths: Int[Tensor, "..."] | None = None,
        cache: KVCache | None = None,
        counted: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the features that ``head`` turns into logits. The arguments are those of `encode`.

        Raises:
            ConfigurationError: If there is a cache or a prefix: every token sees all others of its document.
        """
        if cache is not None or prefix_lengths is not None:
            given = "a cache" if cache is not None else "prefix_lengths"
            raise ConfigurationError(
                f"An encoder was given {given}. Every token of it sees all others, so it neither generates nor has "
                "prefixes; use a TransformerConfig with Attention(causal=True)."
            )
        features = self.encode(
            input_ids,
            position_ids=position_ids,
            document_ids=document_ids,
            token_type_ids=token_type_ids,
            counted=counted,
        )
        return features if self.prediction is None else cast(Tensor, self.prediction(features))

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | None = None,
        token_type_ids: Int[Tensor, "batch seq"] | None = None,
        prefix_lengths: Int[Tensor, "..."] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return the logits of the token at each place. The arguments are those of `encode`."""
        hidden = self.hidden(
            input_ids,
            position_ids=position_ids,
            document_ids=document_ids,
            token_type_ids=token_type_ids,
            prefix_lengths=prefix_lengths,
            cache=cache,
        )
        logits = self.head(hidden)
        softcap = self.logit_softcap
        return cast(Tensor, logits if softcap is None else softcap * torch.tanh(logits / softcap))

    def _embed(self, input_ids: Tensor, context: Context) -> Tensor:
        x = super()._embed(input_ids, context)
        types = context.token_type_ids
        if self.token_types is not None:
            x = x + (self.token_types.weight[0] if types is None else self.token_types(types))
        elif types is not None and bool(types.any()):
            raise ConfigurationError("token_type_ids were given to a model without token types; set token_types=2.")
        return x if self.embedding_norm is None else cast(Tensor, self.embedding_norm(x))

"""Encoder-decoder: a source is read in both directions, and a target is written that looks at it.

`EncoderDecoder.given(source_ids)` is a causal language model of the target: losses, generation, beam search and every
way to sample work with it as with any other. In packed rows target i sees source i. Vaswani et al. 2017,
arXiv:1706.03762; Raffel et al. 2020, arXiv:1910.10683 (T5).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.attention import Attention
from lightning_lm.models.cache import KVCache
from lightning_lm.models.config import ModelConfig, with_vocabulary
from lightning_lm.models.context import make_context
from lightning_lm.models.cross_attention import CrossAttention, Memory
from lightning_lm.models.ffn import FFN, MLP
from lightning_lm.models.transformer import Layer, TransformerConfig
from lightning_lm.parts import Limit

__all__ = ["ConditionedDecoder", "EncoderDecoder", "EncoderDecoderConfig", "decoder_layers"]


def decoder_layers(
    *, attention: Attention = Attention(), cross: CrossAttention = CrossAttention(), ffn: FFN = MLP()
) -> tuple[Layer, Layer]:
    """Return the two layers that make one layer of a decoder: one mixes the target, one reads the source.

    Args:
        attention: Self-attention of the target.
        cross: Attention to the source.
        ffn: Transforms each token.
    """
    return Layer(mixer=attention, ffn=None), Layer(mixer=cross, ffn=ffn)


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(ModelConfig, limits={"output_scale": Limit.FINITE}):
    """An encoder and a decoder.

    Args:
        vocab_size: Number of token ids; ``None`` to take it from the tokenizer.
        context_length: Most tokens of a source, and how far generation goes unless told otherwise; that of both parts.
        encoder: Reads the source; its layers see both directions. Its output layer is not made.
        decoder: Writes the target; its layers alternate as `decoder_layers` has them, so that ``num_layers`` is twice
            the number of decoder layers.
        share_embeddings: Source and target have the same embeddings.
        output_scale: Multiplies the features before the output layer (T5 1.0: ``d_model ** -0.5``).

    Raises:
        ConfigurationError: If the parts do not fit together.
    """

    encoder: TransformerConfig
    decoder: TransformerConfig
    share_embeddings: bool = True
    output_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder.d_model != self.decoder.d_model:
            raise ConfigurationError(
                f"The encoder has d_model={self.encoder.d_model} and the decoder {self.decoder.d_model}; "
                "cross-attention and shared embeddings need the same."
            )
        for name in ("encoder", "decoder"):
            mixers = [layer.mixer for layer in getattr(self, name).depth_pattern]
            reads = any(isinstance(mixer, CrossAttention) for mixer in mixers)
            if reads != (name == "decoder"):
                raise ConfigurationError(
                    f"The {name} has {'no ' if name == 'decoder' else ''}layers of CrossAttention. Give the decoder "
                    "layers=decoder_layers(...), and the encoder layers of Attention(causal=False)."
                )

    def build(self, vocab_size: int | None = None) -> "EncoderDecoder":
        """Return the model, with initial weights unless it is made on the meta device.

        Args:
            vocab_size: That of the tokenizer, for a config that leaves its own out.
        """
        given = dataclasses.replace(self.decoder, vocab_size=self.vocab_size or self.decoder.vocab_size)
        decoder = dataclasses.replace(with_vocabulary(given, vocab_size), context_length=self.context_length)
        encoder = dataclasses.replace(
            self.encoder, vocab_size=decoder.vocab_size, context_length=self.context_length, tie_embeddings=False
        )
        config = dataclasses.replace(self, vocab_size=decoder.vocab_size, encoder=encoder, decoder=decoder)
        return EncoderDecoder(config)


class EncoderDecoder(nn.Module):
    """Sources in, a language model of their targets out.

    Args:
        config: Configuration; its ``vocab_size`` must be known.
    """

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = config.decoder.build()
        self.encoder = config.encoder.build()
        self.encoder.head = nn.Identity()  # type: ignore[assignment]  # it predicts nothing
        if config.share_embeddings:
            self.encoder.embed = self.decoder.embed
        if not self.decoder.is_causal:
            raise ConfigurationError("The decoder reads later tokens; give its layers Attention(causal=True).")

    @property
    def head(self) -> nn.Linear:
        """Output layer."""
        return self.decoder.head

    @property
    def logit_softcap(self) -> float | None:
        """Bound of the logits."""
        return self.decoder.logit_softcap

    @property
    def is_causal(self) -> bool:
        """Return whether no target token depends on later ones."""
        return self.decoder.is_causal

    @property
    def embed(self) -> nn.Embedding:
        """Embeddings of the target."""
        return self.decoder.embed

    def tie_weights(self) -> None:
        """Let the head and the embeddings share their weight again, if the config says so."""
        self.decoder.tie_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Re-initialise every parameter."""
        self.encoder.init_weights(generator)
        self.decoder.init_weights(generator)

    def given(
        self,
        source_ids: Int[Tensor, "batch source"],
        source_document_ids: Int[Tensor, "batch source"] | None = None,
    ) -> "ConditionedDecoder":
        """Return the language model of the targets of these sources.

        Args:
            source_ids: Tokens of the sources.
            source_document_ids: Index of the source of each token, counted from 0 in each row; padding has an index of
                its own. By default each row is one source.

        Raises:
            ConfigurationError: If a source is longer than the encoder reads.
        """
        limit = self.config.context_length
        if source_document_ids is None and source_ids.size(1) > limit:
            raise ConfigurationError(
                f"A source has {source_ids.size(1)} tokens, and the encoder reads context_length={limit}. Cut the "
                f"source, or build the model with context_length={source_ids.size(1)}."
            )
        hidden = self.encoder.hidden(source_ids, document_ids=source_document_ids)
        return ConditionedDecoder(self, Memory(hidden, source_document_ids))

    def forward(
        self,
        source_ids: Int[Tensor, "batch source"],
        input_ids: Int[Tensor, "batch target"],
        *,
        source_document_ids: Int[Tensor, "batch source"] | None = None,
        document_ids: Int[Tensor, "batch target"] | None = None,
    ) -> Float[Tensor, "batch target vocab"]:
        """Return next-token logits of targets.

        Args:
            source_ids: Tokens of the sources.
            input_ids: Tokens of the targets, each after the begin token.
            source_document_ids: As in `given`.
            document_ids: Index of the target of each token; target i sees source i.
        """
        return cast(Tensor, self.given(source_ids, source_document_ids)(input_ids, document_ids=document_ids))


class ConditionedDecoder(nn.Module):
    """A causal language model of the targets of given sources; meets `protocols.LanguageModel`.

    Args:
        model: The encoder-decoder.
        memory: Encoded sources.
    """

    def __init__(self, model: EncoderDecoder, memory: Memory) -> None:
        super().__init__()
        self.model, self.memory = model, memory
        self.train(model.training)

    @property
    def config(self) -> TransformerConfig:
        """Configuration of the decoder."""
        return self.model.config.decoder

    @property
    def head(self) -> nn.Linear:
        """Output layer."""
        return self.model.head

    @property
    def embed(self) -> nn.Embedding:
        """Embeddings of the target."""
        return self.model.decoder.embed

    @property
    def logit_softcap(self) -> float | None:
        """Bound of the logits."""
        return self.model.logit_softcap

    def hidden(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | None = None,
        cache: KVCache | None = None,
        counted: Tensor | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the features that ``head`` turns into logits. The arguments are those of `Transformer.hidden`."""
        decoder = self.model.decoder
        context = make_context(input_ids, position_ids, document_ids, cache)
        context.counted, context.target_ids, context.memory = counted, document_ids, self._rows(len(input_ids))
        features = decoder.finish(decoder.run(input_ids, context))
        scale = self.model.config.output_scale
        return features if scale is None else features * scale

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return next-token logits. The arguments are those of `Transformer.hidden`."""
        logits: Any = self.head(
            self.hidden(input_ids, position_ids=position_ids, document_ids=document_ids, cache=cache)
        )
        softcap = self.logit_softcap
        return cast(Tensor, logits if softcap is None else softcap * torch.tanh(logits / softcap))

    def make_cache(self, batch_size: int, max_length: int, starts: Int[Tensor, "batch"] | None = None) -> KVCache:
        """Return an empty cache of keys and values.

        Args:
            batch_size: Rows, as many as sources; or any number if there is one source.
            max_length: Tokens that a row will hold at most, prompt included.
            starts: First real column of each row, for prompts padded on the left.
        """
        sources = len(self.memory.hidden)
        if sources not in (1, batch_size):
            raise ConfigurationError(
                f"{sources} sources were given, and {batch_size} rows are to be written. Give one prompt for each "
                "source, in their order, and leave the generator's batch_size at None; or give a single source."
            )
        return self.model.decoder.make_cache(batch_size, max_length, starts)

    def _rows(self, batch_size: int) -> Memory:
        """Return the sources of a batch; after the first pass of a generation its cache has them."""
        memory, documents = self.memory, self.memory.document_ids
        if len(memory.hidden) != 1 or batch_size == 1:
            return memory
        rows = None if documents is None else documents.expand(batch_size, -1)
        return Memory(memory.hidden.expand(batch_size, -1, -1), rows)

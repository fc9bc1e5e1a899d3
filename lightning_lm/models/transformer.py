"""The transformer: token ids in, next-token logits out.

Read this page first: its configuration, the model, a layer. `models.attention` mixes tokens, `models.ffn` transforms
each by itself. A variant is a new part, never a new field, and nothing depends on a model's name. Kernels and
parallelism are applied from outside and never appear here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.attention import Documents
from lightning_lm.models.attention import Attention
from lightning_lm.models.cache import KVCache, LayerState
from lightning_lm.models.config import ModelConfig, with_vocabulary
from lightning_lm.models.context import Context, make_context
from lightning_lm.models.ffn import FFN, GLU
from lightning_lm.models.init import Init, Normal
from lightning_lm.models.mixer import Mixer, MixerModule
from lightning_lm.models.norms import Norm, RMSNorm
from lightning_lm.models.position_bias import PositionBias
from lightning_lm.models.positions import Positions, Rope, RotaryTable
from lightning_lm.models.roles import with_role
from lightning_lm.parts import Limit, Part

__all__ = ["Block", "Layer", "Residual", "Transformer", "TransformerConfig"]

Sublayer = Callable[[Tensor], Tensor]
Residual = Literal["pre", "post", "sandwich", "reordered", "parallel"]


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
    limits={
        "context_length": Limit.COUNT,
        "logit_softcap": Limit.POSITIVE,
        "dropout": Limit.BELOW_ONE,
        "embed_scale": Limit.FINITE,
        "residual_scale": Limit.FINITE,
        "output_scale": Limit.FINITE,
    },
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
        positions: Absolute positions added to the embeddings, or a bias of the scores by distance that all layers
            share; rotary positions belong to the attention.
        tie_embeddings: Share the head's weight with the embedding.
        embed_scale: Multiplies the embeddings (Gemma: ``sqrt(d_model)``).
        residual_scale: Multiplies what a sublayer adds to the residual stream (Granite).
        output_scale: Multiplies the features before the head, and so the logits (Granite).
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
    residual_scale: float | None = None
    output_scale: float | None = None
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
        return Transformer(with_vocabulary(self, vocab_size))


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        config: Configuration; its ``vocab_size`` must be known.
    """

    parallel_plan: ClassVar = {"embed": "embed", "positions": "positions", "norm": "last_norm", "head": "head"}

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self.logit_softcap = config.logit_softcap
        self.embed = with_role(nn.Embedding(config.vocab_size, config.d_model), "embedding")
        kind = config.positions
        self.positions: Any = None if kind is None else kind.build(config.d_model, config.context_length)
        self.layers = nn.ModuleList(Block(config, layer) for layer in config.depth_pattern)
        self.norm = config.norm.build(config.d_model) if config.final_norm else nn.Identity()
        self.head = with_role(nn.Linear(config.d_model, config.vocab_size, bias=False), "head")
        self.tie_weights()
        self._rotary = self._rotary_tables()
        if not self.embed.weight.is_meta:
            self.init_weights()

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | None = None,
        prefix_lengths: Int[Tensor, "..."] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return next-token logits. The arguments are those of `hidden`."""
        features = self.hidden(
            input_ids,
            position_ids=position_ids,
            document_ids=document_ids,
            prefix_lengths=prefix_lengths,
            cache=cache,
        )
        logits = self.head(features)
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return cast(Tensor, logits)

    def hidden(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | Documents | None = None,
        prefix_lengths: Int[Tensor, "..."] | None = None,
        cache: KVCache | None = None,
        counted: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the normalised features that ``head`` turns into logits.

        Args:
            input_ids: Tokens; with a cache, those after the ones it holds.
            position_ids: Place of each token in its document; counted by default.
            document_ids: Equal inside a document; no token sees another document's. Or `Documents`, which may continue
                tokens of others.
            prefix_lengths: Tokens at the start of each row, or of each token's document, that see each other in both
                directions (a prefix language model); by default none.
            cache: Keys and values of earlier tokens, from `make_cache`; the new ones are added.
            counted: Tokens that count for the loads of experts and auxiliary losses; by default all.
        """
        context = make_context(input_ids, position_ids, document_ids, cache, prefix_lengths)
        context.counted = counted
        return self.finish(self.run(input_ids, context))

    def run(self, input_ids: Int[Tensor, "batch seq"], context: Context) -> Float[Tensor, "batch seq d_model"]:
        """Return the residual stream after the last layer, before the last norm.

        Args:
            input_ids: Tokens.
            context: Their positions, documents and cache.
        """
        for key, table in self._rotary.items():
            context.rotations[key] = table(context.positions, context.num_positions, input_ids.device)
        x, cache = self._embed(input_ids, context), context.cache
        x = F.dropout(x, self.config.dropout) if self.training and self.config.dropout else x
        for index, block in enumerate(self.layers):
            context.before_last = x
            x = block(x, context, None if cache is None else cache.layers[index])
        if cache is not None:
            cache.advance(input_ids.size(1))
        return x

    def finish(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """Return the features that ``head`` reads: the residual stream after the last layer, normalised and scaled.

        Args:
            x: From `run`.
        """
        scale, features = self.config.output_scale, cast(Tensor, self.norm(x))
        return features if scale is None else features * scale

    def _embed(self, input_ids: Tensor, context: Context) -> Tensor:
        x = self.embed(input_ids)
        if self.config.embed_scale is not None:
            x = x * self.config.embed_scale
        if isinstance(self.positions, PositionBias):
            context.bias = self.positions
        elif self.positions is not None:
            x = x + self.positions(context.positions, context.num_positions, input_ids.device)
        return cast(Tensor, x)

    @property
    def is_causal(self) -> bool:
        """Return whether no token depends on later ones, so that the model can generate."""
        return all(getattr(block.mixer, "is_causal", True) for block in self.layers)

    def make_cache(self, batch_size: int, max_length: int, starts: Int[Tensor, "batch"] | None = None) -> KVCache:
        """Return an empty cache of keys and values.

        Args:
            batch_size: Rows.
            max_length: Tokens that a row will hold at most, prompt included.
            starts: First real column of each row, for prompts padded on the left.
        """
        mixers: list[Any] = [block.mixer for block in self.layers]
        layers = [mixer.make_state(max_length) for mixer in mixers]
        return KVCache(layers, batch_size=batch_size, max_length=max_length, starts=starts)

    def tie_weights(self) -> None:
        """Let the head and the embedding share their weight again, if the config says so."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Re-initialise every parameter, for instance after ``to_empty`` of a model made on the meta device."""
        self.config.init.apply(self, num_layers=self.config.num_layers, generator=generator)

    def _rotary_tables(self) -> dict[tuple[Rope, int], RotaryTable]:
        """One table of cosines and sines for each kind of rotary embedding in the layers."""
        kinds = {module.rotary for module in self.modules() if isinstance(module, MixerModule)} - {None}
        return {kind: RotaryTable(*kind, self.config.context_length) for kind in kinds if kind is not None}


class Block(nn.Module):
    """One layer of the transformer.

    Args:
        config: Norm, residual form and dropout.
        layer: Mixer and feed-forward.
    """

    parallel_plan: ClassVar = {"*_norm": "norm", "mixer": "gather", "ffn": "gather"}

    def __init__(self, config: TransformerConfig, layer: Layer) -> None:
        super().__init__()
        self.residual, self.dropout, self.residual_scale = config.residual, config.dropout, config.residual_scale
        self.mixer_norm = config.norm.build(config.d_model)
        self.mixer = layer.mixer.build(config.d_model, norm=config.norm)
        self.ffn_norm = nn.Identity() if layer.ffn is None else config.norm.build(config.d_model)
        self.ffn = None if layer.ffn is None else layer.ffn.build(config.d_model)
        sandwich = config.residual == "sandwich"
        self.mixer_post_norm = config.norm.build(config.d_model) if sandwich else None
        self.ffn_post_norm = config.norm.build(config.d_model) if sandwich and layer.ffn is not None else None

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        context: Context | None = None,
        state: LayerState | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Mix the tokens, then transform each.

        Args:
            x: Hidden states.
            context: Positions, documents and cache of the tokens; by default rows of one document each.
            state: Keys and values of earlier tokens, or what else the mixer keeps.
        """

        def mix(x: Tensor) -> Tensor:
            return cast(Tensor, self.mixer(x, context, state))

        def transform(x: Tensor) -> Tensor:
            ffn: Any = self.ffn
            return cast(Tensor, ffn(x, context) if getattr(ffn, "takes_context", False) else ffn(x))

        if self.ffn is None:
            return self._join(x, mix, self.mixer_norm, self.mixer_post_norm)
        if self.residual == "parallel":
            return x + self._added(mix(self.mixer_norm(x))) + self._added(transform(self.ffn_norm(x)))
        x = self._join(x, mix, self.mixer_norm, self.mixer_post_norm)
        return self._join(x, transform, self.ffn_norm, self.ffn_post_norm)

    def _join(self, x: Tensor, sublayer: Sublayer, norm: Any, post_norm: Any) -> Tensor:
        """Add what a sublayer makes of the stream to the stream."""
        match self.residual:
            case "post":
                joined = norm(x + self._added(sublayer(x)))
            case "reordered":
                joined = x + self._added(norm(sublayer(x)))
            case "sandwich":
                joined = x + self._added(post_norm(sublayer(norm(x))))
            case _:
                joined = x + self._added(sublayer(norm(x)))
        return cast(Tensor, joined)

    def _added(self, x: Tensor) -> Tensor:
        """Return what is added to the residual stream of a sublayer's output."""
        x = F.dropout(x, self.dropout) if self.training and self.dropout else x
        return x if self.residual_scale is None else x * self.residual_scale

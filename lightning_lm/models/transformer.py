"""The transformer: token ids in, next-token logits out.

Read this page first. `models.attention` mixes tokens, `models.ffn` transforms each by itself, `models.config` says what
can be chosen. Kernels and parallelism are applied from outside and never appear here.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.functional.attention import Documents
from lightning_lm.models.attention import SelfAttention
from lightning_lm.models.cache import KVCache, LayerCache
from lightning_lm.models.config import Layer, TransformerConfig
from lightning_lm.models.context import Context, make_context
from lightning_lm.models.positions import Rope, RotaryTable
from lightning_lm.models.roles import with_role

__all__ = ["Block", "Transformer"]

Sublayer = Callable[[Tensor], Tensor]


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
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self._rotary = self._rotary_tables()
        if not self.embed.weight.is_meta:
            self.init_weights()

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return next-token logits. The arguments are those of `hidden`."""
        features = self.hidden(input_ids, position_ids=position_ids, document_ids=document_ids, cache=cache)
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
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the normalised features that ``head`` turns into logits.

        Args:
            input_ids: Tokens; with a cache, those after the ones it holds.
            position_ids: Place of each token in its document; counted by default.
            document_ids: Equal inside a document; no token sees another document's. Or `Documents`, which may continue
                tokens of others.
            cache: Keys and values of earlier tokens, from `make_cache`; the new ones are added.
        """
        context = make_context(input_ids, position_ids, document_ids, cache)
        for key, table in self._rotary.items():
            context.rotations[key] = table(context.positions, context.num_positions, input_ids.device)
        x = self._embed(input_ids, context)
        for index, block in enumerate(self.layers):
            x = block(x, context, None if cache is None else cache.layers[index])
        if cache is not None:
            cache.advance(input_ids.size(1))
        return cast(Tensor, self.norm(x))

    def _embed(self, input_ids: Tensor, context: Context) -> Tensor:
        x = self.embed(input_ids)
        if self.config.embed_scale is not None:
            x = x * self.config.embed_scale
        if self.config.positions is not None:
            x = x + self.positions(context.positions, context.num_positions, input_ids.device)
        return F.dropout(x, self.config.dropout) if self.training and self.config.dropout else x

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

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Re-initialise every parameter, for instance after ``to_empty`` of a model made on the meta device."""
        self.config.init.apply(self, num_layers=self.config.num_layers, generator=generator)

    def _rotary_tables(self) -> dict[tuple[Rope, int], RotaryTable]:
        """One table of cosines and sines for each kind of rotary embedding in the layers."""
        mixers = [module for module in self.modules() if isinstance(module, SelfAttention)]
        kinds = {(mixer.part.rope, mixer.head_dim) for mixer in mixers if mixer.part.rope is not None}
        return {(rope, size): RotaryTable(rope, size, self.config.context_length) for rope, size in kinds}


class Block(nn.Module):
    """One layer of the transformer.

    Args:
        config: Norm, residual form and dropout.
        layer: Mixer and feed-forward.
    """

    parallel_plan: ClassVar = {"*_norm": "norm", "mixer": "gather", "ffn": "gather"}

    def __init__(self, config: TransformerConfig, layer: Layer) -> None:
        super().__init__()
        self.residual, self.dropout = config.residual, config.dropout
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
        state: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Mix the tokens, then transform each.

        Args:
            x: Hidden states.
            context: Positions, documents and cache of the tokens; by default rows of one document each.
            state: Keys and values of earlier tokens.
        """

        def mix(x: Tensor) -> Tensor:
            return cast(Tensor, self.mixer(x, context, state))

        if self.ffn is None:
            return self._join(x, mix, self.mixer_norm, self.mixer_post_norm)
        if self.residual == "parallel":
            return x + self._drop(mix(self.mixer_norm(x))) + self._drop(self.ffn(self.ffn_norm(x)))
        x = self._join(x, mix, self.mixer_norm, self.mixer_post_norm)
        return self._join(x, self.ffn, self.ffn_norm, self.ffn_post_norm)

    def _join(self, x: Tensor, sublayer: Sublayer, norm: Any, post_norm: Any) -> Tensor:
        """Add what a sublayer makes of the stream to the stream."""
        match self.residual:
            case "post":
                joined = norm(x + self._drop(sublayer(x)))
            case "reordered":
                joined = x + self._drop(norm(sublayer(x)))
            case "sandwich":
                joined = x + self._drop(post_norm(sublayer(norm(x))))
            case _:
                joined = x + self._drop(sublayer(norm(x)))
        return cast(Tensor, joined)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

"""Multi-token prediction: heads that are trained on the tokens after the next one, beside the next-token head.

`MultiTokenConfig` is a transformer with such heads, `modules.MultiToken` the loss over all of them. The next-token path
is that of `Transformer` and pays nothing at inference, where the heads may be ignored.
"""

import abc
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_lm.models.config import with_vocabulary
from lightning_lm.models.context import Context, make_context
from lightning_lm.models.position_bias import PositionBias
from lightning_lm.models.roles import with_role
from lightning_lm.models.transformer import Block, Layer, Transformer, TransformerConfig
from lightning_lm.parts import Limit, Part

__all__ = ["AheadHeads", "MultiTokenConfig", "MultiTokenTransformer", "ParallelHeads", "SequentialHeads"]

Stream = Float[Tensor, "batch seq d_model"]
HeadOutput = tuple[Stream, Stream]


@dataclass(frozen=True, kw_only=True)
class AheadHeads(Part, abc.ABC, limits={"num_tokens": Limit.COUNT}):
    """Base of the heads that predict further tokens.

    Args:
        num_tokens: Tokens after the next one that are predicted.
        layer: Composition of the layer of each head; ``None`` for the last one of the model.
    """

    num_tokens: int = 1
    layer: Layer | None = None

    @abc.abstractmethod
    def build_head(self, config: TransformerConfig) -> nn.Module:
        """Return the head of one token; its `forward` is that of `SequentialHead`.

        Args:
            config: Configuration of the model.
        """

    def head_layer(self, config: TransformerConfig) -> Layer:
        """Return the composition of the layer of a head.

        Args:
            config: Configuration of the model.
        """
        return config.depth_pattern[-1] if self.layer is None else self.layer


@dataclass(frozen=True, kw_only=True)
class SequentialHeads(AheadHeads):
    """Heads in a chain: each reads the features of the one before and the token that has just become known.

    Source:
        DeepSeek-V3, arXiv:2412.19437, section 2.2, equations 21 to 23.
    """

    def build_head(self, config: TransformerConfig) -> nn.Module:
        """Return the head of one token."""
        return SequentialHead(config, self.head_layer(config))


@dataclass(frozen=True, kw_only=True)
class ParallelHeads(AheadHeads):
    """Heads beside the last layer: each has a layer of its own on the same trunk, and none sees the tokens between.

    The trunk ends before the last layer of the model, which is the head of the next token.

    Source:
        Gloeckle et al. 2024, arXiv:2404.19737, section 2.
    """

    def build_head(self, config: TransformerConfig) -> nn.Module:
        """Return the head of one token."""
        return ParallelHead(config, self.head_layer(config))


@dataclass(frozen=True, kw_only=True)
class MultiTokenConfig(TransformerConfig):
    """A decoder-only transformer that also predicts tokens after the next one.

    Args:
        ahead: Heads of the further tokens.

    Example:
        >>> config = MultiTokenConfig(vocab_size=50, d_model=16, num_layers=2, ahead=SequentialHeads(num_tokens=2))
        >>> [tuple(x.shape) for x in config.build().hidden_ahead(torch.zeros(1, 8, dtype=torch.int64))]
        [(1, 8, 16), (1, 7, 16), (1, 6, 16)]
    """

    ahead: AheadHeads = SequentialHeads()

    def build(self, vocab_size: int | None = None) -> "MultiTokenTransformer":
        """Return the model, with initial weights unless it is made on the meta device.

        Args:
            vocab_size: That of the tokenizer, for a config that leaves its own out.
        """
        return MultiTokenTransformer(with_vocabulary(self, vocab_size))


class SequentialHead(nn.Module):
    """Head of DeepSeek-V3.

    Args:
        config: Configuration of the model.
        layer: Composition of its layer.
    """

    def __init__(self, config: TransformerConfig, layer: Layer) -> None:
        super().__init__()
        self.stream_norm, self.token_norm = config.norm.build(config.d_model), config.norm.build(config.d_model)
        self.join = with_role(nn.Linear(2 * config.d_model, config.d_model, bias=False), "matrix")
        self.block, self.norm = Block(config, layer), config.norm.build(config.d_model)

    def forward(self, stream: Stream, trunk: Stream, tokens: Stream, context: Context) -> HeadOutput:  # noqa: ARG002
        """Return the stream of this head, and the features that the output layer takes.

        Args:
            stream: Stream of the head before, at first of the model's last layer.
            trunk: Stream before the model's last layer.
            tokens: Embeddings of the newest token that is known here.
            context: Places of the tokens.
        """
        joined = torch.cat([self.stream_norm(stream), self.token_norm(tokens)], dim=-1)
        stream = self.block(self.join(joined), context)
        return stream, self.norm(stream)


class ParallelHead(nn.Module):
    """Head of Gloeckle et al.

    Args:
        config: Configuration of the model.
        layer: Composition of its layer.
    """

    def __init__(self, config: TransformerConfig, layer: Layer) -> None:
        super().__init__()
        self.block, self.norm = Block(config, layer), config.norm.build(config.d_model)

    def forward(self, stream: Stream, trunk: Stream, tokens: Stream, context: Context) -> HeadOutput:  # noqa: ARG002
        """Return the stream of this head, and the features that the output layer takes.

        Args:
            stream: Stream of the head before.
            trunk: Stream before the model's last layer.
            tokens: Embeddings of the newest token that is known.
            context: Places of the tokens.
        """
        stream = self.block(trunk, context)
        return stream, self.norm(stream)


class MultiTokenTransformer(Transformer):
    """A decoder-only language model with heads of further tokens; they share its embedding and output layer.

    Args:
        config: Configuration; its ``vocab_size`` must be known.
    """

    def __init__(self, config: MultiTokenConfig) -> None:
        super().__init__(config)
        self.ahead = nn.ModuleList(config.ahead.build_head(config) for _ in range(config.ahead.num_tokens))
        self._rotary = self._rotary_tables()
        if not self.embed.weight.is_meta:
            config.init.apply(self.ahead, num_layers=config.num_layers)

    def hidden_ahead(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | None = None,
        counted: Bool[Tensor, "batch seq"] | None = None,
    ) -> list[Float[Tensor, "batch positions d_model"]]:
        """Return features that the output layer turns into logits of the next token, the one after it, and so on.

        Those of a token ``k`` places after the next have ``seq - k`` positions. At the last ``k`` positions of a
        document the tokens between belong to the next one, so there they predict nothing.

        Args:
            input_ids: Tokens.
            position_ids: Place of each token in its document; counted by default.
            document_ids: Equal inside a document; no token sees another document's.
            counted: Tokens that count for the loads of experts; by default all.
        """
        context = make_context(input_ids, position_ids, document_ids, None)
        context.counted = counted
        stream = self.run(input_ids, context)
        trunk = context.before_last
        assert trunk is not None
        found, scale = [self.finish(stream)], self.config.output_scale or 1.0
        for k, head in enumerate(cast(Any, self.ahead), start=1):
            if k == input_ids.size(1):
                break
            places, documents = (None if x is None else x[:, :-k] for x in (position_ids, document_ids))
            context = self._head_context(input_ids[:, :-k], places, documents)
            context.counted = None if counted is None else counted[:, :-k]
            tokens = self.embed(input_ids[:, k:]) * (self.config.embed_scale or 1.0)
            stream, features = head(stream[:, : tokens.size(1)], trunk[:, : tokens.size(1)], tokens, context)
            found.append(features * scale)
        return found

    def _head_context(self, input_ids: Tensor, position_ids: Tensor | None, document_ids: Tensor | None) -> Context:
        context = make_context(input_ids, position_ids, document_ids, None)
        for key, table in self._rotary.items():
            context.rotations[key] = table(context.positions, context.num_positions, input_ids.device)
        context.bias = self.positions if isinstance(self.positions, PositionBias) else None
        return context

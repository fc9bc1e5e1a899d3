"""Cross-attention: tokens of a target read the encoded tokens of a source.

A decoder layer of Vaswani et al. 2017 is two layers here: one mixes the target, the next reads the source and
transforms each token. Keys and values of a source are made once for a whole generation.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.attention import bidirectional_attention
from lightning_lm.models.cache import LayerState
from lightning_lm.models.context import Context
from lightning_lm.models.init import residual_output
from lightning_lm.models.mixer import AttentionShape, Mixer, MixerModule
from lightning_lm.models.norms import Norm
from lightning_lm.parts import Limit

__all__ = ["CrossAttention", "Memory", "MemoryState", "SourceAttention"]


@dataclass(eq=False)
class Memory:
    """Encoded sources."""

    hidden: Float[Tensor, "batch source d_model"]
    """Features of the tokens."""
    document_ids: Int[Tensor, "batch source"] | None = None
    """Index of the source of each token; targets with the same index see it. ``None`` for one source per row."""
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, targets: Int[Tensor, "batch target"] | None) -> Bool[Tensor, "batch 1 #target source"] | None:
        """Return which source tokens each target token sees; those of source 0 where targets have no index.

        A target token without a source, such as padding, sees everything, so that its softmax is not 0 / 0.

        Args:
            targets: Index of the target of each token.
        """
        if self.document_ids is None:
            return None
        key = id(targets)
        if key not in self._masks:
            wanted = self.document_ids.new_zeros(len(self.document_ids), 1) if targets is None else targets
            visible = wanted[:, :, None] == self.document_ids[:, None, :]
            self._masks[key] = (visible | ~visible.any(dim=-1, keepdim=True)).unsqueeze(1)
        return self._masks[key]


class MemoryState(LayerState):
    """Keys and values of the sources, made when the first target token is read; the same for all later ones."""

    def __init__(self) -> None:
        self.made: tuple[Tensor, Tensor, Tensor | None] | None = None
        """Keys, values and mask."""

    @property
    def can_rewind(self) -> bool:
        """Return whether columns can be forgotten: a source has none of them."""
        return True

    def rewind(self, columns: int) -> None:
        """Do nothing: a source stays.

        Args:
            columns: Number of target tokens that are forgotten.
        """

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Keep the sources of these rows, in this order."""
        if self.made is not None:
            keys, values, mask = self.made
            self.made = keys[rows], values[rows], None if mask is None else mask[rows]


@dataclass(frozen=True, kw_only=True)
class CrossAttention(
    Mixer,
    limits={"num_heads": Limit.COUNT, "head_dim": Limit.COUNT, "scale": Limit.FINITE, "dropout": Limit.BELOW_ONE},
):
    """Attention of target tokens to the encoded tokens of their source.

    Args:
        num_heads: Heads.
        head_dim: Features of a head; ``None`` for ``d_model / num_heads``.
        scale: Multiplies the scores; ``None`` for ``1 / sqrt(head_dim)``, 1 in T5.
        bias: Projections that have biases.
        dropout: Probability with which an attention weight is dropped in training.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3.
    """

    num_heads: int = 8
    head_dim: int | None = None
    scale: float | None = None
    bias: Literal["none", "qkv", "all"] = "none"
    dropout: float = 0.0

    def build(self, d_model: int, *, norm: Norm) -> MixerModule:  # noqa: ARG002
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return SourceAttention(self, d_model)


class SourceAttention(MixerModule):
    """Attention to encoded sources.

    Args:
        part: The description.
        d_model: Features of the residual stream, and of the encoder.
    """

    parallel_plan: ClassVar = {"[qkv]": "colwise", "o": "rowwise"}
    parallel_divides: ClassVar = ("num_heads",)

    def __init__(self, part: CrossAttention, d_model: int) -> None:
        super().__init__()
        if part.head_dim is None and d_model % part.num_heads:
            raise ConfigurationError(
                f"num_heads={part.num_heads} does not divide d_model={d_model}. Change one of them, or give head_dim."
            )
        self.part, self.num_heads = part, part.num_heads
        self.head_dim = part.head_dim or d_model // part.num_heads
        width = self.num_heads * self.head_dim
        self.q, self.k, self.v = (nn.Linear(d_model, width, bias=part.bias != "none") for _ in range(3))
        self.o = residual_output(nn.Linear(width, d_model, bias=part.bias == "all"))

    @property
    def attention_shape(self) -> AttentionShape:
        """Heads; a source is taken to be as long as the target."""
        return AttentionShape(self.num_heads * self.head_dim, self.num_heads)

    def mixing_flops(self, context_length: int, *, causal: bool = False) -> float:  # noqa: ARG002
        """Return the FLOPs per token of scores and sums over a source as long as the target."""
        return super().mixing_flops(context_length)

    def make_state(self, max_length: int) -> MemoryState:  # noqa: ARG002
        """Return an empty place for keys and values of the sources."""
        return MemoryState()

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        context: Context | None = None,
        state: MemoryState | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Read the sources.

        Args:
            x: Hidden states of the target tokens.
            context: Has the encoded sources and the documents of the tokens.
            state: Keys and values of the sources, made by the first call.

        Raises:
            ConfigurationError: If there is no source.
        """
        if context is None or context.memory is None:
            raise ConfigurationError(
                "CrossAttention reads encoded sources, and there are none. Build the model as the decoder of an "
                "EncoderDecoderConfig, and call it through model.given(source_ids)."
            )
        if state is None:
            k, v, mask = self._keys(context)
        else:
            state.made = k, v, mask = state.made or self._keys(context)
        q = self._heads(self.q(x))
        dropout = self.part.dropout if self.training else 0.0
        mixed = bidirectional_attention(q, k, v, mask=mask, scale=self.part.scale, dropout=dropout)
        return cast(Tensor, self.o(mixed.transpose(1, 2).flatten(2)))

    def _keys(self, context: Context) -> tuple[Tensor, Tensor, Tensor | None]:
        memory: Memory = context.memory
        keys, values = self._heads(self.k(memory.hidden)), self._heads(self.v(memory.hidden))
        return keys, values, memory.mask(context.target_ids)

    def _heads(self, x: Tensor) -> Tensor:
        return cast(Tensor, x.unflatten(-1, (self.num_heads, self.head_dim))).transpose(1, 2)

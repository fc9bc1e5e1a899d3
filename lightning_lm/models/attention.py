"""Self-attention with any number of key heads, rotary positions, normalised queries and a sliding window."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from jaxtyping import Float
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.attention import Documents, biased_attention
from lightning_lm.functional.rope import rotate
from lightning_lm.kernels.attention import attention
from lightning_lm.models.cache import LayerCache
from lightning_lm.models.context import Context, make_context
from lightning_lm.models.init import residual_output
from lightning_lm.models.mixer import AttentionShape, Mixer, MixerModule
from lightning_lm.models.norms import Norm
from lightning_lm.models.positions import Rope
from lightning_lm.parts import Limit

__all__ = ["Attention", "Mixer", "SelfAttention"]


@dataclass(frozen=True, kw_only=True)
class Attention(
    Mixer,
    limits={
        "num_heads": Limit.COUNT,
        "num_kv_heads": Limit.COUNT,
        "head_dim": Limit.COUNT,
        "softcap": Limit.POSITIVE,
        "scale": Limit.FINITE,
        "dropout": Limit.BELOW_ONE,
    },
):
    """Self-attention, causal or in both directions.

    Args:
        num_heads: Query heads.
        num_kv_heads: Key and value heads, each shared by a group of query heads; ``None`` for ``num_heads``, 1 for
            multi-query attention.
        head_dim: Features of a head; ``None`` for ``d_model / num_heads``.
        rope: Rotary positions; ``None`` for none.
        qk_norm: Normalise queries and keys with the model's norm: each ``head`` by itself, or all heads together
            (``full``).
        window: Keys a query sees, itself included; ``None`` for all. In both directions: keys at this distance and
            beyond, on either side, are not seen.
        softcap: Scores are squeezed to ``softcap * tanh(score / softcap)``.
        scale: Multiplies the scores; ``None`` for ``1 / sqrt(head_dim)``.
        bias: Projections that have biases.
        dropout: Probability with which an attention weight is dropped in training.
        causal: Tokens see no later ones; ``False`` for encoders, which cannot generate.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023, arXiv:2305.13245; query and key norm:
        Henry et al. 2020, arXiv:2010.04245; window: Beltagy et al. 2020, arXiv:2004.05150.
    """

    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope: Rope | None = Rope()
    qk_norm: Literal["head", "full"] | None = None
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    bias: Literal["none", "qkv", "all"] = "none"
    dropout: float = 0.0
    causal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ConfigurationError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}. Use a divisor of it."
            )
        if self.window is not None and self.window < 1:
            raise ConfigurationError(f"window={self.window} would let a token see nothing; use at least 1, or null.")

    def build(self, d_model: int, *, norm: Norm) -> MixerModule:
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return SelfAttention(self, d_model, norm=norm)


class SelfAttention(MixerModule):
    """Self-attention, causal or in both directions.

    Args:
        part: The description.
        d_model: Features of the residual stream.
        norm: Normalisation of queries and keys, where the description asks for it.
    """

    parallel_plan: ClassVar = {"[qkv]": "colwise", "q_norm": "qk_norm", "k_norm": "qk_norm", "o": "rowwise"}
    parallel_divides: ClassVar = ("num_heads", "num_kv_heads")

    def __init__(self, part: Attention, d_model: int, *, norm: Norm) -> None:
        super().__init__()
        if part.head_dim is None and d_model % part.num_heads:
            raise ConfigurationError(
                f"num_heads={part.num_heads} does not divide d_model={d_model}. Change one of them, or give head_dim."
            )
        self.part = part
        self.num_heads = part.num_heads
        self.num_kv_heads = part.num_kv_heads or part.num_heads
        self.head_dim = part.head_dim or d_model // part.num_heads
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q = nn.Linear(d_model, width, bias=part.bias != "none")
        self.k = nn.Linear(d_model, kv_width, bias=part.bias != "none")
        self.v = nn.Linear(d_model, kv_width, bias=part.bias != "none")
        self.o = residual_output(nn.Linear(width, d_model, bias=part.bias == "all"))
        full = part.qk_norm == "full"
        self.q_norm: Any = part.qk_norm and norm.build(width if full else self.head_dim)
        self.k_norm: Any = part.qk_norm and norm.build(kv_width if full else self.head_dim)

    @property
    def is_causal(self) -> bool:
        """Return whether no token depends on later ones."""
        return self.part.causal

    @property
    def rotary(self) -> tuple[Rope, int] | None:
        """Rotary embedding and the size of the heads it turns; ``None`` without one."""
        return None if self.part.rope is None else (self.part.rope, self.head_dim)

    @property
    def attention_shape(self) -> AttentionShape:
        """Heads and window."""
        part = self.part
        window = part.window if part.window is None or part.causal else 2 * part.window - 1
        return AttentionShape(self.num_heads * self.head_dim, self.num_heads, window)

    def mixing_flops(self, context_length: int, *, causal: bool = False) -> float:
        """Return the FLOPs per token of the forward pass that no weight takes part in.

        Args:
            context_length: Tokens of a row.
            causal: Count only the keys that a query can see; in both directions these are all.
        """
        return super().mixing_flops(context_length, causal=causal and self.part.causal)

    def make_state(self, max_length: int) -> LayerCache:
        """Return an empty memory of keys and values for up to ``max_length`` columns.

        Raises:
            ConfigurationError: If tokens see later ones, which a cache of earlier ones cannot have.
        """
        if not self.part.causal:
            raise ConfigurationError(
                "Attention(causal=False) reads the tokens after each token, so the model cannot write text token by "
                "token. Give the layers Attention(causal=True), or use an EncoderDecoder, whose decoder is causal."
            )
        return LayerCache(max_length, self.part.window)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        context: Context | None = None,
        state: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Mix each token with those it may see.

        Args:
            x: Hidden states of the new tokens.
            context: Positions, documents and cache of the tokens; by default rows of one document each.
            state: Keys and values of earlier tokens; the new ones are added.

        Raises:
            ConfigurationError: If there is a state without the context that it belongs to.
        """
        part, context = self.part, self._context(x, state) if context is None else context
        q, k, v = self._project(x)
        if part.rope is not None:
            q, k = self.apply_rope(q, k, *context.rotations[part.rope, self.head_dim])
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if state is not None:
            k, v = state.append(k, v, context.columns)
        mask = context.mask(k.size(2), part.window)
        mixed = self.attend(q, k, v, mask) if context.bias is None else self._attend_with_bias(q, k, v, mask, context)
        return self.output(mixed.transpose(1, 2).flatten(2), x)

    def output(self, mixed: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        """Return the output of the layer, [batch, seq, d_model].

        Args:
            mixed: Weighed values of all heads, [batch, seq, heads * head_dim].
            x: Hidden states, for layers that choose by them.
        """
        return cast(Tensor, self.o(mixed))

    def _context(self, x: Tensor, state: LayerCache | None) -> Context:
        if state is not None:
            raise ConfigurationError(
                "Keys of earlier tokens need the context of the model: call the model with a cache."
            )
        context, rope = make_context(x[..., 0], None, None, None), self.part.rope
        if rope is not None:
            cos, sin = rope.table(self.head_dim, x.size(1))
            context.rotations[rope, self.head_dim] = cos.to(x.device), sin.to(x.device)
        return context

    def apply_rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys, [batch, seq, heads, head_dim], by the angles of their positions.

        Args:
            q: Queries.
            k: Keys.
            cos: From `functional.rope_table`.
            sin: Like ``cos``.
        """
        interleaved = cast(Rope, self.part.rope).interleaved
        return rotate(q, cos, sin, interleaved=interleaved), rotate(k, cos, sin, interleaved=interleaved)

    def _attend_with_bias(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Documents | Tensor | None, context: Context
    ) -> Tensor:
        part = self.part
        if part.window is not None or part.softcap is not None or context.columns is not None:
            raise ConfigurationError(
                "A bias of the scores by distance works without a sliding window, a soft cap, and speculation. Set "
                "window and softcap of Attention to null and decode without, or take Rope() instead of the bias."
            )
        assert context.bias is not None
        dropout = part.dropout if self.training else 0.0
        return biased_attention(q, k, v, context.bias, causal=part.causal, mask=mask, scale=part.scale, dropout=dropout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Documents | Tensor | None) -> Tensor:
        """Weigh values by scores, [batch, heads, seq, head_dim], by what is fastest on this device for these shapes.

        Args:
            q: Queries, the last of the keys.
            k: Keys.
            v: Values.
            mask: Restriction of the queries beyond causality and the window.
        """
        part = self.part
        dropout = part.dropout if self.training else 0.0
        return attention(
            q,
            k,
            v,
            mask=mask,
            window=part.window,
            causal=part.causal,
            softcap=part.softcap,
            scale=part.scale,
            dropout=dropout,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, ``[batch, seq, heads, head_dim]``."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.part.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
        if self.part.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

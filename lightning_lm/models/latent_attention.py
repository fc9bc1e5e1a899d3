"""Multi-head latent attention: all heads read keys and values that are expanded from one small vector per token.

The cache holds that vector and one rotated key, which all heads share: ``kv_rank + rope_dim`` numbers per token, where
`Attention` keeps ``2 * num_heads * head_dim``. A pass over many tokens expands them and attends as usual. A pass over
few tokens with a long memory moves the expansion to the other side of the product instead, ``q . (W c) = (W' q) . c``,
so that no key of an earlier token is ever made again.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.documents import Documents, band
from lightning_lm.functional.rope import rotate
from lightning_lm.kernels.attention import attention
from lightning_lm.models.cache import LayerCache
from lightning_lm.models.context import Context, make_context
from lightning_lm.models.init import residual_output
from lightning_lm.models.mixer import AttentionShape, Mixer, MixerModule
from lightning_lm.models.norms import Norm, RMSNorm
from lightning_lm.models.positions import Rope
from lightning_lm.parts import Limit

__all__ = ["LatentAttention", "LatentSelfAttention"]


@dataclass(frozen=True, kw_only=True)
class LatentAttention(
    Mixer,
    limits={
        "num_heads": Limit.COUNT,
        "kv_rank": Limit.COUNT,
        "q_rank": Limit.COUNT,
        "nope_dim": Limit.COUNT,
        "rope_dim": Limit.COUNT,
        "v_dim": Limit.COUNT,
        "scale": Limit.FINITE,
        "dropout": Limit.BELOW_ONE,
    },
):
    """Causal self-attention over compressed keys and values.

    Args:
        num_heads: Heads.
        kv_rank: Features of the vector that a token's keys and values are expanded from.
        q_rank: The same for queries; ``None`` to project them directly.
        nope_dim: Features of a head's queries and keys that carry no position.
        rope_dim: Features of a head's queries that are rotated, and of the rotated key, which all heads share.
        v_dim: Features of a head's values.
        rope: Rotary positions.
        latent_norm: Normalisation of the compressed vectors.
        scale: Multiplies the scores; ``None`` for ``1 / sqrt(nope_dim + rope_dim)``.
        bias: Give the projections from and to the residual stream biases, but not the direct one of the queries.
        dropout: Probability with which an attention weight is dropped in training.

    Source:
        DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C.
    """

    num_heads: int = 8
    kv_rank: int = 128
    q_rank: int | None = None
    nope_dim: int = 32
    rope_dim: int = 32
    v_dim: int = 64
    rope: Rope = Rope(interleaved=True)
    latent_norm: Norm = RMSNorm()
    scale: float | None = None
    bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope.fraction != 1:
            raise ConfigurationError(
                f"rope.fraction={self.rope.fraction} of LatentAttention must be 1: rope_dim says how much is rotated."
            )

    def build(self, d_model: int, *, norm: Norm) -> MixerModule:  # noqa: ARG002
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return LatentSelfAttention(self, d_model)


class LatentSelfAttention(MixerModule):
    """Causal self-attention over compressed keys and values.

    Args:
        part: The description.
        d_model: Features of the residual stream.
    """

    parallel_plan: ClassVar = {
        "q": "colwise",
        "q_down": "partial",
        "q_norm": "partial",
        "q_up": "colwise",
        "kv_down": "partial",
        "kv_norm": "partial",
        "k_rope": "partial",
        "k_up": "colwise",
        "v_up": "colwise",
        "o": "rowwise",
    }
    parallel_divides: ClassVar = ("num_heads",)

    def __init__(self, part: LatentAttention, d_model: int) -> None:
        super().__init__()
        self.part, self.num_heads = part, part.num_heads
        self.key_dim = part.nope_dim + part.rope_dim
        self.scale = self.key_dim**-0.5 if part.scale is None else part.scale
        queries = part.num_heads * self.key_dim
        self.q: Any = None if part.q_rank else nn.Linear(d_model, queries, bias=False)
        self.q_down: Any = nn.Linear(d_model, part.q_rank, bias=part.bias) if part.q_rank else None
        self.q_norm: Any = part.latent_norm.build(part.q_rank) if part.q_rank else None
        self.q_up: Any = nn.Linear(part.q_rank, queries, bias=False) if part.q_rank else None
        self.kv_down = nn.Linear(d_model, part.kv_rank, bias=part.bias)
        self.kv_norm = part.latent_norm.build(part.kv_rank)
        self.k_rope = nn.Linear(d_model, part.rope_dim, bias=part.bias)
        self.k_up = nn.Linear(part.kv_rank, part.num_heads * part.nope_dim, bias=False)
        self.v_up = nn.Linear(part.kv_rank, part.num_heads * part.v_dim, bias=False)
        self.o = residual_output(nn.Linear(part.num_heads * part.v_dim, d_model, bias=part.bias))

    @property
    def rotary(self) -> tuple[Rope, int]:
        """Rotary embedding and the size of what it turns."""
        return self.part.rope, self.part.rope_dim

    @property
    def attention_shape(self) -> AttentionShape:
        """Heads; the width is the mean of the keys' and the values'."""
        return AttentionShape(self.num_heads * (self.key_dim + self.part.v_dim) // 2, self.num_heads)

    def make_state(self, max_length: int) -> LayerCache:
        """Return an empty memory of compressed vectors and rotated keys for up to ``max_length`` columns."""
        return LayerCache(max_length)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        context: Context | None = None,
        state: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Mix each token with those before it.

        Args:
            x: Hidden states of the new tokens.
            context: Positions, documents and cache of the tokens; by default rows of one document each.
            state: Compressed vectors and rotated keys of earlier tokens; the new ones are added.

        Raises:
            ConfigurationError: If there is a state without the context that it belongs to.
        """
        context = self._context(x, state) if context is None else context
        cos, sin = context.rotations[self.rotary]
        interleaved = self.part.rope.interleaved
        queries = self.q(x) if self.q is not None else self.q_up(self.q_norm(self.q_down(x)))
        queries = queries.unflatten(-1, (-1, self.key_dim))
        q, q_rope = queries.split([self.part.nope_dim, self.part.rope_dim], dim=-1)
        q_rope = rotate(q_rope, cos, sin, interleaved=interleaved)
        latent = self.kv_norm(self.kv_down(x)).unsqueeze(1)
        k_rope = rotate(self.k_rope(x).unsqueeze(2), cos, sin, interleaved=interleaved).transpose(1, 2)
        if state is not None:
            latent, k_rope = state.append(latent, k_rope, context.columns)
        mask = context.mask(latent.size(2), None)
        q, q_rope = q.transpose(1, 2), q_rope.transpose(1, 2)
        if state is not None and not isinstance(mask, Documents) and self._absorbing_pays(x.size(1)):
            mixed = self.attend_absorbed(q, q_rope, latent.squeeze(1), k_rope.squeeze(1), mask)
        else:
            mixed = self.attend_expanded(q, q_rope, latent.squeeze(1), k_rope, mask)
        return cast(Tensor, self.o(mixed.transpose(1, 2).flatten(2)))

    def attend_expanded(
        self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Documents | Tensor | None
    ) -> Float[Tensor, "batch heads new v_dim"]:
        """Attend to keys and values that are made for all tokens.

        Args:
            q: Queries without position, [batch, heads, new, nope_dim].
            q_rope: Rotated queries, [batch, heads, new, rope_dim].
            latent: Compressed vectors, [batch, seen, kv_rank].
            k_rope: Rotated keys, [batch, 1, seen, rope_dim].
            mask: Restriction of the queries beyond causality.
        """
        keys = self.k_up(latent).unflatten(-1, (-1, self.part.nope_dim)).transpose(1, 2)
        values = self.v_up(latent).unflatten(-1, (-1, self.part.v_dim)).transpose(1, 2)
        keys = torch.cat((keys, k_rope.to(keys.dtype).expand(-1, keys.size(1), -1, -1)), dim=-1)
        queries = torch.cat((q, q_rope), dim=-1)
        dropout = self.part.dropout if self.training else 0.0
        return attention(queries, keys, values, mask=mask, scale=self.scale, dropout=dropout)

    def attend_absorbed(
        self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Float[Tensor, "batch heads new v_dim"]:
        """Attend to the compressed vectors themselves; the same up to rounding.

        Args:
            q: Queries without position, [batch, heads, new, nope_dim].
            q_rope: Rotated queries, [batch, heads, new, rope_dim].
            latent: Compressed vectors, [batch, seen, kv_rank].
            k_rope: Rotated keys, [batch, seen, rope_dim].
            mask: Keys that the queries see, [batch, 1, new, seen]; ``None`` for all up to their own places.
        """
        heads, new, seen = q.size(1), q.size(2), latent.size(1)
        k_up = self.k_up.weight.unflatten(0, (heads, -1)).to(q.dtype)
        v_up = self.v_up.weight.unflatten(0, (heads, -1)).to(q.dtype)
        absorbed = (q @ k_up).flatten(1, 2)  # heads are rows of one product: [batch, heads * new, kv_rank]
        scores = absorbed @ latent.mT + q_rope.flatten(1, 2) @ k_rope.mT
        scores = scores.unflatten(1, (heads, new)) * self.scale
        if mask is None and new > 1:
            mask = band(new, seen, None, device=q.device)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
        weights = F.dropout(weights, self.part.dropout) if self.training else weights
        mixed = (weights.flatten(1, 2) @ latent).unflatten(1, (heads, new))
        return cast(Tensor, mixed @ v_up.mT)

    def _absorbing_pays(self, new: int) -> bool:
        """Compare the products: scores and sums over ``kv_rank`` features instead of an expansion of every token."""
        if {type(self.k_up), type(self.v_up)} != {nn.Linear}:  # adapters and quantized layers are more than a weight
            return False
        part = self.part
        return new * (2 * part.kv_rank - part.nope_dim - part.v_dim) < part.kv_rank * (part.nope_dim + part.v_dim)

    def _context(self, x: Tensor, state: LayerCache | None) -> Context:
        if state is not None:
            raise ConfigurationError(
                "Keys of earlier tokens need the context of the model: call the model with a cache."
            )
        context = make_context(x[..., 0], None, None, None)
        cos, sin = self.part.rope.table(self.part.rope_dim, x.size(1))
        context.rotations[self.rotary] = cos.to(x.device), sin.to(x.device)
        return context

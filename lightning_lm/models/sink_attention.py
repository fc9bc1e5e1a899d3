"""Attention whose heads can attend to nothing."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.attention import Documents
from lightning_lm.functional.sink_attention import sink_attention
from lightning_lm.models.attention import Attention, SelfAttention
from lightning_lm.models.cache import LayerCache
from lightning_lm.models.context import Context
from lightning_lm.models.mixer import MixerModule
from lightning_lm.models.norms import Norm

__all__ = ["SinkAttention", "SinkSelfAttention"]


@dataclass(frozen=True, kw_only=True)
class SinkAttention(Attention):
    """Causal self-attention in which each head has one learned score that takes part in the softmax without a value.

    Args:
        num_heads: See `Attention`, as of all arguments.

    Source:
        gpt-oss, arXiv:2508.10925, section 2.2, after Xiao et al. 2023, arXiv:2309.17453.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.softcap is not None:
            raise ConfigurationError(f"softcap={self.softcap} cannot be combined with sinks; leave it out.")
        if not self.causal:
            raise ConfigurationError("SinkAttention is causal only; use Attention(causal=False) without sinks.")

    def build(self, d_model: int, *, norm: Norm) -> MixerModule:
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return SinkSelfAttention(self, d_model, norm=norm)


class _Sinks(nn.Module):
    """One learned score per head."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a key whose score is zero."""
        nn.init.zeros_(self.scores)


class SinkSelfAttention(SelfAttention):
    """Causal self-attention with a learned sink in each head.

    Args:
        part: The description.
        d_model: Features of the residual stream.
        norm: Normalisation of queries and keys, where the description asks for it.
    """

    def __init__(self, part: SinkAttention, d_model: int, *, norm: Norm) -> None:
        super().__init__(part, d_model, norm=norm)
        self.sinks = _Sinks(part.num_heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Documents | Tensor | None) -> Tensor:
        """Weigh values by scores, [batch, heads, seq, head_dim]; the sinks take the rest.

        Args:
            q: Queries, the last of the keys.
            k: Keys.
            v: Values.
            mask: Restriction of the queries beyond causality and the window.
        """
        dropout, part = self.part.dropout if self.training else 0.0, self.part
        return sink_attention(
            q, k, v, self.sinks.scores, mask=mask, window=part.window, scale=part.scale, dropout=dropout
        )

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], context: Context | None = None, state: LayerCache | None = None
    ) -> Float[Tensor, "batch seq d_model"]:
        """Mix each token with those it may see; see `SelfAttention.forward`.

        Raises:
            ConfigurationError: If the model adds a bias to the scores.
        """
        if context is not None and context.bias is not None:
            raise ConfigurationError("SinkAttention takes no bias of the scores by distance; use Rope(), or Attention.")
        return super().forward(x, context, state)

"""Attention whose output a gate multiplies, feature by feature: a head that has found nothing can stay silent."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_lm.models.attention import Attention, SelfAttention
from lightning_lm.models.norms import Norm

__all__ = ["GatedAttention", "GatedSelfAttention"]


@dataclass(frozen=True, kw_only=True)
class GatedAttention(Attention):
    """Causal self-attention with a sigmoid gate on its output, as in Qwen3-Next.

    Source:
        Qiu et al. 2025, arXiv:2505.06708.
    """

    def build(self, d_model: int, *, norm: Norm) -> "GatedSelfAttention":
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return GatedSelfAttention(self, d_model, norm=norm)


class GatedSelfAttention(SelfAttention):
    """Causal self-attention with a gate.

    Args:
        part: The description.
        d_model: Features of the residual stream.
        norm: Normalisation of queries and keys, where the description asks for it.
    """

    parallel_plan: ClassVar = {**SelfAttention.parallel_plan, "gate": "colwise"}

    def __init__(self, part: Attention, d_model: int, *, norm: Norm) -> None:
        super().__init__(part, d_model, norm=norm)
        self.gate = nn.Linear(d_model, self.num_heads * self.head_dim, bias=part.bias != "none")

    def output(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Return the output of the layer, [batch, seq, d_model].

        Args:
            mixed: Weighed values of all heads, [batch, seq, heads * head_dim].
            x: Hidden states, which the gate reads.
        """
        return cast(Tensor, self.o(mixed * torch.sigmoid(self.gate(x))))

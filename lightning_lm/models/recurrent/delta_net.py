"""DeltaNet and gated DeltaNet: linear attention that corrects its memory instead of adding to it.

A plain linear attention only ever adds to its state. The delta rule first reads what the state returns for a key, and
writes the difference to the wanted value, a step of online gradient descent; the gated form also lets the state decay,
which clears it quickly. Queries and keys have length one and pass through a short convolution.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.kernels.recurrence.operation import linear_recurrence
from lightning_lm.models.init import residual_output
from lightning_lm.models.norms import GainRMSNorm, Norm
from lightning_lm.models.recurrent.layers import ShortConvolution, TimeStep, unit_length
from lightning_lm.models.recurrent.mixer import Memory, RecurrentMixer, RecurrentPart
from lightning_lm.parts import Limit

__all__ = ["DeltaNet", "DeltaNetMixer", "GatedDeltaNet"]


@dataclass(frozen=True, kw_only=True)
class DeltaNet(
    RecurrentPart,
    limits={
        "num_heads": Limit.COUNT,
        "num_v_heads": Limit.COUNT,
        "head_dim": Limit.COUNT,
        "v_head_dim": Limit.COUNT,
        "conv": Limit.COUNT,
    },
):
    """Linear attention with the delta rule.

    Args:
        num_heads: Heads of queries and keys.
        num_v_heads: Heads of values, each with a state of its own; neighbours share a head of keys. ``None`` for
            ``num_heads``.
        head_dim: Features of a head of queries and keys; ``None`` for ``d_model / num_heads``.
        v_head_dim: Features of a head of values; ``None`` for ``head_dim``.
        conv: Tokens that the short convolutions of queries, keys and values see.

    Source:
        Schlag et al. 2021, arXiv:2102.11174; in parallel form: Yang et al. 2024, arXiv:2406.06484.
    """

    num_heads: int = 8
    num_v_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    conv: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_v_heads is not None and self.num_v_heads % self.num_heads:
            raise ConfigurationError(
                f"num_heads={self.num_heads} does not divide num_v_heads={self.num_v_heads}. Use a multiple of it."
            )

    def spelt_out(self, d_model: int) -> "DeltaNet":
        """Return the same part with the sizes that it leaves to defaults.

        Args:
            d_model: Features of the residual stream.
        """
        head_dim = self.head_dim or d_model // self.num_heads
        v_head_dim, num_v_heads = self.v_head_dim or head_dim, self.num_v_heads or self.num_heads
        return replace(self, head_dim=head_dim, v_head_dim=v_head_dim, num_v_heads=num_v_heads)

    def build(self, d_model: int, *, norm: Norm) -> "DeltaNetMixer":
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return DeltaNetMixer(self, d_model, eps=getattr(norm, "eps", 1e-6), gated=False)


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(DeltaNet):
    """DeltaNet with a decay of the state and an output gate: the recurrent layers of Qwen3-Next.

    Source:
        Yang et al. 2024, arXiv:2412.06464.
    """

    def build(self, d_model: int, *, norm: Norm) -> "DeltaNetMixer":
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return DeltaNetMixer(self, d_model, eps=getattr(norm, "eps", 1e-6), gated=True)


class DeltaNetMixer(RecurrentMixer):
    """Linear attention with the delta rule.

    Args:
        part: The description.
        d_model: Features of the residual stream.
        eps: Added to the mean square of the normalised output.
        gated: Let the state decay, and multiply the output by a gate.
    """

    parallel_plan: ClassVar = {
        "[qkvb]": "colwise",
        "a": "colwise",
        "z": "colwise",
        "conv_*": "channels",
        "time_step": "channels",
        "norm": "partial",
        "o": "rowwise",
    }
    parallel_divides: ClassVar = ("num_heads", "num_v_heads")

    def __init__(self, part: DeltaNet, d_model: int, *, eps: float, gated: bool) -> None:
        super().__init__()
        if part.head_dim is None and d_model % part.num_heads:
            raise ConfigurationError(
                f"num_heads={part.num_heads} does not divide d_model={d_model}. Change one of them, or give head_dim."
            )
        self.part = part
        self.num_heads, self.num_v_heads = part.num_heads, part.num_v_heads or part.num_heads
        self.head_dim = part.head_dim or d_model // part.num_heads
        self.v_head_dim = part.v_head_dim or self.head_dim
        width, v_width = self.num_heads * self.head_dim, self.num_v_heads * self.v_head_dim
        self.q = nn.Linear(d_model, width, bias=False)
        self.k = nn.Linear(d_model, width, bias=False)
        self.v = nn.Linear(d_model, v_width, bias=False)
        self.b = nn.Linear(d_model, self.num_v_heads, bias=False)
        self.a = nn.Linear(d_model, self.num_v_heads, bias=False) if gated else None
        self.z = nn.Linear(d_model, v_width, bias=False) if gated else None
        self.conv_q = ShortConvolution(width, part.conv)
        self.conv_k = ShortConvolution(width, part.conv)
        self.conv_v = ShortConvolution(v_width, part.conv)
        self.time_step = TimeStep(self.num_v_heads) if gated else None
        self.norm = GainRMSNorm(self.v_head_dim, eps=eps)
        self.o = residual_output(nn.Linear(v_width, d_model, bias=False))

    def mixing_flops(self, context_length: int, *, causal: bool = False) -> float:  # noqa: ARG002
        """Return the FLOPs per token of the state: it is read twice, for the key and for the query, and written once.

        Args:
            context_length: Not needed, as the state has the same size at any length.
            causal: Not needed either.
        """
        return 6.0 * self.num_v_heads * self.head_dim * self.v_head_dim

    def mix(
        self,
        x: Float[Tensor, "batch seq d_model"],
        document_ids: Int[Tensor, "batch seq"] | None,
        memory: Memory | None,
    ) -> tuple[Float[Tensor, "batch seq d_model"], Memory]:
        """Return the outputs of some tokens, and the memory after them.

        Args:
            x: Hidden states.
            document_ids: Documents of the tokens; ``None`` if each row is one.
            memory: Last inputs of the three convolutions, and the state.
        """
        tail_q, tail_k, tail_v, state = memory or (None, None, None, None)
        q, tail_q = self.conv_q(self.q(x), document_ids, tail_q)
        k, tail_k = self.conv_k(self.k(x), document_ids, tail_k)
        v, tail_v = self.conv_v(self.v(x), document_ids, tail_v)
        q, k = (unit_length(heads.unflatten(-1, (-1, self.head_dim))) for heads in (q, k))
        v = v.unflatten(-1, (-1, self.v_head_dim))
        log_decay = None
        if self.time_step is not None and self.a is not None:
            _, log_decay = self.time_step(self.a(x))
        mixed, state = linear_recurrence(
            q * self.head_dim**-0.5,
            k,
            v,
            log_decay,
            beta=self.b(x).sigmoid(),
            document_ids=document_ids,
            state=state,
        )
        mixed = self.norm(mixed).flatten(2)
        if self.z is not None:
            mixed = mixed * F.silu(self.z(x))
        return cast(Tensor, self.o(mixed)), (tail_q, tail_k, tail_v, state)

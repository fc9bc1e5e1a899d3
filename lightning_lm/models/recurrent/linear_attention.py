"""Linear attention: the softmax replaced by a product of features, so that a state of constant size sums up the past.

Without a decay an output is the mean of all values weighed by ``phi(q) . phi(k)``, as in softmax attention. With one,
old tokens fade: at a fixed rate per head (retention), or at one that each token chooses for each feature of the keys
(gated linear attention). Such outputs have no weights that sum to one; they are normalised per head and gated instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.kernels.recurrence.operation import linear_recurrence
from lightning_lm.models.init import residual_output
from lightning_lm.models.norms import GainRMSNorm, Norm
from lightning_lm.models.recurrent.layers import Constants
from lightning_lm.models.recurrent.mixer import Memory, RecurrentMixer, RecurrentPart
from lightning_lm.parts import Limit, Part

__all__ = ["Decay", "FixedDecay", "GatedDecay", "LinearAttention", "LinearAttentionMixer"]


def _elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _identity(x: Tensor) -> Tensor:
    return x


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"elu": _elu, "relu": F.relu, "identity": _identity}
"""Feature maps of queries and keys by name."""


@dataclass(frozen=True, kw_only=True)
class Decay(Part):
    """Base of the decays of a state."""

    def build(self, d_model: int, num_heads: int, head_dim: int) -> nn.Module:
        """Return a module from hidden states to logarithms of decays, [batch, seq, heads] or with the keys' features.

        Args:
            d_model: Features of the residual stream.
            num_heads: Heads.
            head_dim: Features of a head of keys.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FixedDecay(Decay, limits={"fastest": Limit.COUNT}):
    """Retention: head ``h`` forgets ``2^-(fastest + h)`` of its state with each token.

    Args:
        fastest: Negative power of two that the first head forgets.

    Source:
        Sun et al. 2023, arXiv:2307.08621, equation 8.
    """

    fastest: int = 5

    def build(self, d_model: int, num_heads: int, head_dim: int) -> nn.Module:  # noqa: ARG002
        """Return a module from hidden states to logarithms of decays."""
        return FixedRates(num_heads, self.fastest)


@dataclass(frozen=True, kw_only=True)
class GatedDecay(Decay, limits={"rank": Limit.COUNT, "temperature": Limit.POSITIVE}):
    """A learned gate for each feature of the keys, ``sigmoid(W x)^(1 / temperature)``.

    Args:
        rank: Inner size of ``W``, a product of two matrices.
        temperature: The larger, the slower is forgotten.

    Source:
        Yang et al. 2023, arXiv:2312.06635, section 4.4.
    """

    rank: int = 16
    temperature: float = 16.0

    def build(self, d_model: int, num_heads: int, head_dim: int) -> nn.Module:
        """Return a module from hidden states to logarithms of decays."""
        return LearnedGate(self, d_model, num_heads * head_dim, head_dim)


class FixedRates(nn.Module):
    """The same decays for all tokens.

    Args:
        num_heads: Heads.
        fastest: Negative power of two that the first head forgets.
    """

    parallel_plan: ClassVar = {"log_decay": "channels"}

    def __init__(self, num_heads: int, fastest: int) -> None:
        super().__init__()
        self.log_decay = Constants([math.log1p(-(2.0 ** -(fastest + head))) for head in range(num_heads)])

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq heads"]:
        """Return logarithms of decays.

        Args:
            x: Hidden states, whose shape alone matters.
        """
        rates: Tensor = self.log_decay.weight
        return rates.to(torch.promote_types(rates.dtype, torch.float32)).expand(*x.shape[:2], -1)


class LearnedGate(nn.Module):
    """Decays that a token chooses.

    Args:
        part: The description.
        d_model: Features of the residual stream.
        width: Features of all heads of keys.
        head_dim: Features of a head.
    """

    parallel_plan: ClassVar = {"down": "partial", "up": "colwise"}

    def __init__(self, part: GatedDecay, d_model: int, width: int, head_dim: int) -> None:
        super().__init__()
        self.temperature, self.head_dim = part.temperature, head_dim
        self.down = nn.Linear(d_model, part.rank, bias=False)
        self.up = nn.Linear(part.rank, width)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq heads head_dim"]:
        """Return logarithms of decays.

        Args:
            x: Hidden states.
        """
        gates = self.up(self.down(x))
        wide = gates.to(torch.promote_types(gates.dtype, torch.float32))
        return cast(Tensor, (F.logsigmoid(wide) / self.temperature).unflatten(-1, (-1, self.head_dim)))


@dataclass(frozen=True, kw_only=True)
class LinearAttention(
    RecurrentPart,
    limits={"num_heads": Limit.COUNT, "head_dim": Limit.COUNT, "v_head_dim": Limit.COUNT},
):
    """Linear attention.

    Args:
        num_heads: Heads.
        head_dim: Features of a head of queries and keys; ``None`` for ``d_model / num_heads``.
        v_head_dim: Features of a head of values; ``None`` for ``head_dim``.
        feature: Map of queries and keys: ``elu`` is ``elu(x) + 1``, ``identity`` suits decays only, as weights would
            not be positive.
        decay: Decay of the state; ``None`` for none, with outputs divided by the sum of their weights.

    Source:
        Katharopoulos et al. 2020, arXiv:2006.16236; retention: Sun et al. 2023, arXiv:2307.08621; gated: Yang et al.
        2023, arXiv:2312.06635.
    """

    num_heads: int = 8
    head_dim: int | None = None
    v_head_dim: int | None = None
    feature: Literal["elu", "relu", "identity"] = "elu"
    decay: Decay | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay is None and self.feature == "identity":
            raise ConfigurationError(
                "feature='identity' gives weights that may be negative or sum to zero, by which outputs are divided. "
                "Use feature: elu, or a decay such as FixedDecay."
            )

    def build(self, d_model: int, *, norm: Norm) -> "LinearAttentionMixer":
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return LinearAttentionMixer(self, d_model, eps=getattr(norm, "eps", 1e-6))


class LinearAttentionMixer(RecurrentMixer):
    """Linear attention.

    Args:
        part: The description.
        d_model: Features of the residual stream.
        eps: Added to the mean square of the normalised output.
    """

    parallel_plan: ClassVar = {"[qkv]": "colwise", "z": "colwise", "norm": "partial", "o": "rowwise"}
    parallel_divides: ClassVar = ("num_heads",)

    def __init__(self, part: LinearAttention, d_model: int, *, eps: float) -> None:
        super().__init__()
        if part.head_dim is None and d_model % part.num_heads:
            raise ConfigurationError(
                f"num_heads={part.num_heads} does not divide d_model={d_model}. Change one of them, or give head_dim."
            )
        self.part, self.num_heads = part, part.num_heads
        self.head_dim = part.head_dim or d_model // part.num_heads
        self.v_head_dim = part.v_head_dim or self.head_dim
        width, v_width = self.num_heads * self.head_dim, self.num_heads * self.v_head_dim
        self.q = nn.Linear(d_model, width, bias=False)
        self.k = nn.Linear(d_model, width, bias=False)
        self.v = nn.Linear(d_model, v_width, bias=False)
        fades = part.decay is not None
        self.decay: Any = part.decay and part.decay.build(d_model, self.num_heads, self.head_dim)
        self.z = nn.Linear(d_model, v_width, bias=False) if fades else None
        self.norm = GainRMSNorm(self.v_head_dim, eps=eps) if fades else None
        self.o = residual_output(nn.Linear(v_width, d_model, bias=False))

    def mixing_flops(self, context_length: int, *, causal: bool = False) -> float:  # noqa: ARG002
        """Return the FLOPs per token of the state, which is read once and written once.

        Args:
            context_length: Not needed, as the state has the same size at any length.
            causal: Not needed either.
        """
        return 4.0 * self.num_heads * self.head_dim * (self.v_head_dim + (self.decay is None))

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
            memory: The state alone.
        """
        (state,) = memory or (None,)
        feature = FEATURES[self.part.feature]
        q, k = (feature(linear(x).unflatten(-1, (-1, self.head_dim))) for linear in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, self.v_head_dim))
        if self.decay is None:
            wide = F.pad(v.to(torch.promote_types(v.dtype, torch.float32)), (0, 1), value=1.0)
            sums, state = linear_recurrence(q, k, wide, document_ids=document_ids, state=state)
            mixed = (sums[..., :-1] / (sums[..., -1:] + 1e-6)).to(v.dtype).flatten(2)
        else:
            mixed, state = linear_recurrence(
                q * self.head_dim**-0.5, k, v, self.decay(x), document_ids=document_ids, state=state
            )
            mixed = cast(Any, self.norm)(mixed).flatten(2) * F.silu(cast(Any, self.z)(x))
        return cast(Tensor, self.o(mixed)), (state,)

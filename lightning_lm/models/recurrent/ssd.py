"""Mamba-2: a selective state space model with one scalar decay per head, computed by matmuls (SSD).

Each head has a state of ``state x head_dim`` numbers. A token chooses its time step: a long one lets the old state
decay and writes the token strongly, a short one passes it by. In the words of attention, ``C`` is the query, ``B`` the
key and the input times its time step the value.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.kernels.recurrence.operation import linear_recurrence
from lightning_lm.models.init import residual_output
from lightning_lm.models.norms import Norm
from lightning_lm.models.recurrent.layers import GroupNorm, ShortConvolution, Skip, TimeStep
from lightning_lm.models.recurrent.mixer import Memory, RecurrentMixer, RecurrentPart
from lightning_lm.parts import Limit

__all__ = ["SSD", "SSDMixer"]


@dataclass(frozen=True, kw_only=True)
class SSD(
    RecurrentPart,
    limits={
        "num_heads": Limit.COUNT,
        "head_dim": Limit.COUNT,
        "state": Limit.COUNT,
        "groups": Limit.COUNT,
        "conv": Limit.COUNT,
        "expand": Limit.POSITIVE,
    },
):
    """The mixer of Mamba-2. A layer of it needs no feed-forward: ``Layer(mixer=SSD(), ffn=None)``.

    Args:
        num_heads: Heads; ``None`` for ``expand * d_model / head_dim``.
        head_dim: Features of a head.
        state: Numbers that the state has for each feature.
        groups: Groups of heads that share ``B`` and ``C``, and whose outputs are normalised together.
        conv: Tokens that the short convolutions see.
        expand: Width of all heads in multiples of ``d_model``, if ``num_heads`` is not given.
        bias: Give the projections biases; the convolutions always have them.
        gate_norm: Normalise the gated output.

    Source:
        Dao and Gu 2024, arXiv:2405.21060.
    """

    num_heads: int | None = None
    head_dim: int = 64
    state: int = 128
    groups: int = 1
    conv: int = 4
    expand: float = 2.0
    bias: bool = False
    gate_norm: bool = True

    def build(self, d_model: int, *, norm: Norm) -> "SSDMixer":
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return SSDMixer(self, d_model, eps=getattr(norm, "eps", 1e-5))

    def spelt_out(self, d_model: int) -> "SSD":
        """Return the same part with its heads.

        Args:
            d_model: Features of the residual stream.
        """
        heads = self.heads(d_model)
        return replace(self, num_heads=heads, expand=heads * self.head_dim / d_model)

    def heads(self, d_model: int) -> int:
        """Return the number of heads.

        Args:
            d_model: Features of the residual stream.

        Raises:
            ConfigurationError: If heads, groups and width do not fit.
        """
        width = self.expand * d_model
        if self.num_heads is None and width % self.head_dim:
            raise ConfigurationError(
                f"head_dim={self.head_dim} does not divide expand * d_model = {width:g}. Change one of them, or give "
                "num_heads."
            )
        heads = self.num_heads or int(width) // self.head_dim
        if heads % self.groups:
            raise ConfigurationError(f"groups={self.groups} does not divide the {heads} heads. Use a divisor of it.")
        return heads


class SSDMixer(RecurrentMixer):
    """The mixer of Mamba-2.

    Args:
        part: The description.
        d_model: Features of the residual stream.
        eps: Added to the mean square of the normalised output.
    """

    parallel_plan: ClassVar = {
        "[zxBC]": "colwise",
        "dt": "colwise",
        "conv_*": "channels",
        "time_step": "channels",
        "skip": "channels",
        "norm": "channels",
        "o": "rowwise",
    }
    parallel_divides: ClassVar = ("num_heads", "groups")

    def __init__(self, part: SSD, d_model: int, *, eps: float) -> None:
        super().__init__()
        self.part = part
        self.num_heads, self.groups = part.heads(d_model), part.groups
        width, group_width = self.num_heads * part.head_dim, part.groups * part.state
        self.z = nn.Linear(d_model, width, bias=part.bias)
        self.x = nn.Linear(d_model, width, bias=part.bias)
        self.B = nn.Linear(d_model, group_width, bias=part.bias)
        self.C = nn.Linear(d_model, group_width, bias=part.bias)
        self.dt = nn.Linear(d_model, self.num_heads, bias=part.bias)
        self.conv_x = ShortConvolution(width, part.conv, bias=True)
        self.conv_B = ShortConvolution(group_width, part.conv, bias=True)
        self.conv_C = ShortConvolution(group_width, part.conv, bias=True)
        self.time_step = TimeStep(self.num_heads)
        self.skip = Skip(self.num_heads)
        self.norm = GroupNorm(width, width // part.groups, eps=eps) if part.gate_norm else None
        self.o = residual_output(nn.Linear(width, d_model, bias=part.bias))

    def mixing_flops(self, context_length: int, *, causal: bool = False) -> float:  # noqa: ARG002
        """Return the FLOPs per token of the state, which is read once and written once.

        Args:
            context_length: Not needed, as the state has the same size at any length.
            causal: Not needed either.
        """
        return 4.0 * self.num_heads * self.part.head_dim * self.part.state

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
        tail_x, tail_B, tail_C, state = memory or (None, None, None, None)
        value, tail_x = self.conv_x(self.x(x), document_ids, tail_x)
        key, tail_B = self.conv_B(self.B(x), document_ids, tail_B)
        query, tail_C = self.conv_C(self.C(x), document_ids, tail_C)
        key, query = (groups.unflatten(-1, (-1, self.part.state)) for groups in (key, query))
        value = value.unflatten(-1, (-1, self.part.head_dim))
        steps, log_decay = self.time_step(self.dt(x))
        written = steps[..., None] * value  # in float32
        mixed, state = linear_recurrence(query, key, written, log_decay, document_ids=document_ids, state=state)
        gated = (mixed + self.skip(value)).flatten(2).to(x.dtype) * F.silu(self.z(x))
        gated = gated if self.norm is None else self.norm(gated)
        return cast(Tensor, self.o(gated)), (tail_x, tail_B, tail_C, state)

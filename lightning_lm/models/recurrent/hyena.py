"""Hyena: convolutions as long as the text, alternating with elementwise gates, in place of attention.

The filters are not stored but computed: a small network of sines maps the distance of two tokens to a weight for each
channel, times an exponential decay. So a filter of any length has few parameters. Simplified: the frequencies of the
sines are fixed, and generation keeps the history of each convolution's inputs and takes one dot product per token.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.convolution import long_convolution
from lightning_lm.functional.linear_recurrence import number_documents
from lightning_lm.models.context import Context
from lightning_lm.models.init import residual_output
from lightning_lm.models.norms import Norm
from lightning_lm.models.recurrent.layers import Constants, ShortConvolution, Skip
from lightning_lm.models.recurrent.mixer import Memory, RecurrentMixer, RecurrentPart, RecurrentState, run
from lightning_lm.models.roles import with_role
from lightning_lm.parts import Limit

__all__ = ["Hyena", "HyenaMixer"]

_SLOWEST, _FASTEST = math.log(100) / 1.5, math.log(100) / 0.3
"""Decay rates of the filters: from 1 to a hundredth within 1.5 times the length, and within 0.3 of it."""
_SHIFT = 0.05
"""Part of a filter that does not decay."""
_FREQUENCY = 10.0
"""Factor before each sine."""


@dataclass(frozen=True, kw_only=True)
class Hyena(
    RecurrentPart,
    limits={
        "length": Limit.COUNT,
        "order": Limit.COUNT,
        "conv": Limit.COUNT,
        "filter_size": Limit.COUNT,
        "bands": Limit.COUNT,
    },
):
    """The Hyena operator.

    Args:
        length: Tokens of the longest text; distances are measured in it, so it cannot change after training.
        order: Long convolutions, each with a gate.
        conv: Tokens that the short convolutions before them see.
        filter_size: Inner features of the network that computes the filters.
        bands: Frequencies of the sines and cosines of a distance that it sees.

    Source:
        Poli et al. 2023, arXiv:2302.10866.
    """

    length: int = field(kw_only=False)
    order: int = 2
    conv: int = 3
    filter_size: int = 64
    bands: int = 16

    def build(self, d_model: int, *, norm: Norm) -> "HyenaMixer":  # noqa: ARG002
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return HyenaMixer(self, d_model)


class HyenaMixer(RecurrentMixer):
    """The Hyena operator.

    Args:
        part: The description.
        d_model: Features of the residual stream.
    """

    parallel_plan: ClassVar = {"inputs.*": "colwise", "convs.*": "channels", "skips.*": "channels", "o": "rowwise"}
    parallel_divides: ClassVar = ("d_model",)

    def __init__(self, part: Hyena, d_model: int) -> None:
        super().__init__()
        self.part, self.d_model = part, d_model
        streams = range(part.order + 1)
        self.inputs = nn.ModuleList(nn.Linear(d_model, d_model, bias=False) for _ in streams)
        self.convs = nn.ModuleList(ShortConvolution(d_model, part.conv, silu=False) for _ in streams)
        self.filters = nn.ModuleList(ImplicitFilter(part, d_model) for _ in range(part.order))
        self.skips = nn.ModuleList(Skip(d_model) for _ in range(part.order))
        self.o = residual_output(nn.Linear(d_model, d_model, bias=False))

    def mixing_flops(self, context_length: int, *, causal: bool = False) -> float:  # noqa: ARG002
        """Return the FLOPs per token of the convolutions: three transforms of twice the length, and gates.

        Args:
            context_length: Tokens of a row.
            causal: Not needed, as a transform takes the whole row.
        """
        per_channel = 3 * 5 * 2 * math.log2(2 * context_length) + 8
        return self.part.order * self.d_model * per_channel

    def make_state(self, max_length: int) -> "HyenaState":
        """Return an empty memory of the inputs of the convolutions, which grows with the text.

        Args:
            max_length: Columns that a row will have at most.

        Raises:
            ConfigurationError: If the filters are shorter.
        """
        self._check_length(max_length)
        return HyenaState(max_length)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        context: Context | None = None,
        state: RecurrentState | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Mix each token with those before it.

        Args:
            x: Hidden states of the new tokens.
            context: Documents and cache of the tokens; by default rows of one document each.
            state: Memory of earlier tokens; the new ones are added.

        Raises:
            ConfigurationError: If a document is longer than the filters.
        """
        if isinstance(state, HyenaState):
            if state.filters is None:
                state.filters = self._filters(state.max_length)
            return run(partial(self.convolve, state.filters), x, context, state)
        longest = x.size(1)
        if longest > self.part.length and context is not None and context.documents is not None:
            longest = int(context.documents.positions().max()) + 1
        self._check_length(longest)
        return run(partial(self.convolve, self._filters(longest)), x, context, state)

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
            memory: Last inputs of the short convolutions, and all inputs of the long ones.
        """
        seen = x.size(1) + (0 if memory is None else memory[-1].size(1))
        self._check_length(seen)
        return self.convolve(self._filters(seen), x, document_ids, memory)

    def convolve(
        self, filters: list[Tensor], x: Tensor, document_ids: Tensor | None, memory: Memory | None
    ) -> tuple[Tensor, Memory]:
        """Return what `mix` returns, with filters that are known.

        Args:
            filters: Those of each order, [taps, channels].
            x: Hidden states.
            document_ids: Documents of the tokens.
            memory: Memory before them.
        """
        order = self.part.order
        held: list[Tensor | None] = [None] * (2 * order + 1) if memory is None else list(memory)
        tails, histories, streams = held[: order + 1], held[order + 1 :], []
        for index, (linear, conv) in enumerate(zip(self.inputs, self.convs, strict=True)):
            stream, tails[index] = conv(linear(x), document_ids, tails[index])
            streams.append(stream)
        value, *gates = streams
        for index, gate in enumerate(gates):
            convolved, histories[index] = _convolve(value, filters[index], document_ids, histories[index])
            value = gate * (convolved + self.skips[index](value[..., None])[..., 0])
        return cast(Tensor, self.o(value)), tuple(cast(list[Tensor], tails + histories))

    def _filters(self, length: int) -> list[Tensor]:
        return [filter_of_order(length) for filter_of_order in self.filters]

    def _check_length(self, length: int) -> None:
        if length > self.part.length:
            raise ConfigurationError(
                f"A text of {length} tokens is longer than the filters of Hyena(length={self.part.length}). Train with "
                "a larger length, or give shorter texts."
            )


class HyenaState(RecurrentState):
    """Memory of one layer, with the filters that all its tokens use.

    Args:
        max_length: Columns that a row will have at most.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.filters: list[Tensor] | None = None


def _convolve(
    value: Tensor, taps: Tensor, document_ids: Tensor | None, history: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a long convolution, and its inputs so far: zeros for those that are not of the last token's document."""
    new = value.size(1)
    if history is not None:  # going back may have left zeros before the longest text
        history = history[:, max(history.size(1) + new - len(taps), 0) :]
    if history is not None and new == 1:
        inputs = torch.cat((history, value), 1)
        return torch.einsum("btc,tc->bc", inputs, taps[: inputs.size(1)].flip(0).to(value.dtype))[:, None], inputs
    numbers = None if document_ids is None else number_documents(document_ids)
    if history is not None:
        value = torch.cat((history, value), 1)
        if numbers is not None:
            numbers = torch.cat((numbers[:, :1].expand(-1, history.size(1)), numbers), 1)
    convolved = long_convolution(value, taps, document_ids=numbers)[:, -new:]
    return convolved, value if numbers is None else value * (numbers == numbers[:, -1:])[..., None]


class ImplicitFilter(nn.Module):
    """Filter of each channel, as a function of the distance of two tokens.

    Args:
        part: The description.
        channels: Channels.
    """

    parallel_plan: ClassVar = {"hidden.*": "partial", "out": "colwise", "rates": "channels"}

    def __init__(self, part: Hyena, channels: int) -> None:
        super().__init__()
        self.length, self.bands = part.length, part.bands
        sizes = (1 + 2 * part.bands, part.filter_size, part.filter_size)
        # Roles as of convolutions: the weights read a few sines, and begin as those of torch's layers do.
        self.hidden = nn.ModuleList(with_role(nn.Linear(a, b), "conv") for a, b in pairwise(sizes))
        self.out = with_role(nn.Linear(part.filter_size, channels), "conv")
        step = (_FASTEST - _SLOWEST) / max(channels - 1, 1)
        self.rates = Constants([_SLOWEST + step * channel for channel in range(channels)])

    def forward(self, taps: int) -> Float[Tensor, "taps channels"]:
        """Return the first weights, in float32 or better; all together begin with a norm of about one.

        Args:
            taps: Number of weights.
        """
        weight = cast(nn.Linear, self.hidden[0]).weight
        time = torch.arange(taps, device=weight.device, dtype=torch.float32)[:, None] / self.length
        angles = 2 * math.pi * time * torch.linspace(1e-4, self.bands - 1, self.bands, device=weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            features = torch.cat((time, angles.cos(), angles.sin()), 1).to(weight.dtype)
            for linear in self.hidden:
                features = torch.sin(_FREQUENCY * linear(features))
            weights: Tensor = self.out(features)
        rates = self.rates.weight.to(torch.promote_types(weight.dtype, torch.float32))
        energy = -torch.expm1(-2 * rates) / (2 * rates) - 2 * _SHIFT * torch.expm1(-rates) / rates + _SHIFT**2
        return weights * ((-rates * time).exp() + _SHIFT) * (self.length * energy).rsqrt()

"""Mixers side by side: all read the same input, and their outputs are added."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.cache import LayerState
from lightning_lm.models.context import Context
from lightning_lm.models.mixer import Mixer, MixerModule
from lightning_lm.models.norms import Norm

__all__ = ["Parallel", "ParallelMixer", "ParallelState"]


@dataclass(frozen=True, kw_only=True)
class Parallel(Mixer):
    """Mixers side by side, such as attention and a state space model.

    Args:
        mixers: At least two.

    Source:
        Zuo et al. 2025 (Falcon-H1), arXiv:2507.22448.
    """

    mixers: tuple[Mixer, ...] = field(kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mixers) < 2:
            raise ConfigurationError(f"Parallel got {len(self.mixers)} mixer(s); give two or more, or use it itself.")

    def build(self, d_model: int, *, norm: Norm) -> "ParallelMixer":
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return ParallelMixer([mixer.build(d_model, norm=norm) for mixer in self.mixers])


class ParallelMixer(MixerModule):
    """Mixers side by side.

    Args:
        mixers: The modules.
    """

    def __init__(self, mixers: Sequence[MixerModule]) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)

    def mixing_flops(self, context_length: int, *, causal: bool = False) -> float:  # noqa: ARG002
        """Return zero: the mixers count for themselves.

        Args:
            context_length: Not needed.
            causal: Not needed.
        """
        return 0.0

    def make_state(self, max_length: int) -> "ParallelState":
        """Return the empty memories of all mixers.

        Args:
            max_length: Columns that a row will have at most.
        """
        return ParallelState([cast(MixerModule, mixer).make_state(max_length) for mixer in self.mixers])

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        context: Context | None = None,
        state: "ParallelState | None" = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Add the outputs of the mixers.

        Args:
            x: Hidden states of the new tokens.
            context: Positions, documents and cache of the tokens.
            state: Memories of earlier tokens.
        """
        states = [None] * len(self.mixers) if state is None else state.states
        first, *others = (mixer(x, context, own) for mixer, own in zip(self.mixers, states, strict=True))
        return cast(Tensor, sum(others, first))


class ParallelState(LayerState):
    """Memories of the mixers of one layer.

    Args:
        states: One of each mixer.
    """

    def __init__(self, states: Sequence[LayerState]) -> None:
        self.states = list(states)

    @property
    def can_join(self) -> bool:
        """Return whether `join` is supported."""
        return all(state.can_join for state in self.states)

    @property
    def can_rewind(self) -> bool:
        """Return whether any number of the newest columns can be forgotten."""
        return all(state.can_rewind for state in self.states)

    def keep_newest(self, columns: int) -> None:
        """Make sure that as many columns can be forgotten.

        Args:
            columns: Most columns that a row will be rewound by.
        """
        for state in self.states:
            state.keep_newest(columns)

    def rewind(self, columns: int) -> None:
        """Forget the newest columns."""
        for state in self.states:
            state.rewind(columns)

    def rewind_rows(self, columns: Int[Tensor, "batch"], surplus: int) -> None:
        """Forget the newest columns of each row.

        Args:
            columns: Number of them in each row.
            surplus: Columns by which the longest row was longer before.
        """
        for state in self.states:
            state.rewind_rows(columns, surplus)

    def align_right(self, padding: Int[Tensor, "batch"]) -> None:
        """Move the newest columns of each row, which are padding, in front of the others.

        Args:
            padding: Number of them in each row.
        """
        for state in self.states:
            state.align_right(padding)

    def join(self, parts: Sequence[tuple[Tensor, Any]], batch_size: int, length: int) -> None:
        """Take what others hold for some of the rows each.

        Args:
            parts: Places in the batch, and the state of the rows there.
            batch_size: Rows of this state.
            length: Columns that all rows have then.
        """
        for index, state in enumerate(self.states):
            state.join([(rows, part.states[index]) for rows, part in parts], batch_size, length)

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Keep these rows, in this order."""
        for state in self.states:
            state.select(rows)

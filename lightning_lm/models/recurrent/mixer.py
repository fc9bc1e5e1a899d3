"""Base of the mixers that carry a state of constant size from token to token, and that state while text is generated.

A recurrent mixer is one function, `RecurrentMixer.mix`: hidden states and the memory before them in, outputs and the
memory after them out. Everything about rows is done here: documents of packed rows, padding on the left, and the
snapshots that let speculative decoding take tokens back.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.cache import LayerState
from lightning_lm.models.context import Context
from lightning_lm.models.mixer import Mixer, MixerModule

__all__ = ["Memory", "RecurrentMixer", "RecurrentPart", "RecurrentState", "run"]

Memory = tuple[Tensor, ...]
"""Tensors that a mixer keeps of earlier tokens, [batch, ...] each; zeros where there were none."""

Mix = Callable[[Tensor, Tensor | None, Memory | None], tuple[Tensor, Memory]]


@dataclass(frozen=True, kw_only=True)
class RecurrentPart(Mixer):
    """Base of the parts that describe recurrent mixers."""

    def __new__(cls, *arguments: Any, **settings: Any) -> Any:
        """Refuse a window, which attention has.

        Raises:
            ConfigurationError: If there is one.
        """
        if "window" in settings:
            raise ConfigurationError(
                f"{cls.__name__} got window={settings['window']}, but it scores no pairs of tokens: it forgets by its "
                "decay. Leave the window out, or use Attention(window=...) in this layer."
            )
        return super().__new__(cls, *arguments, **settings)

    def spelt_out(self, d_model: int) -> "RecurrentPart":  # noqa: ARG002
        """Return the same part with the sizes that it leaves to defaults.

        Args:
            d_model: Features of the residual stream.
        """
        return self


class RecurrentState(LayerState):
    """Memory of one layer. It is as large after a thousand tokens as after one."""

    def __init__(self) -> None:
        self.memory: Memory | None = None
        self.kept = 0
        """Newest tokens that can be forgotten again."""
        self._earlier: deque[Memory] = deque(maxlen=0)
        """Memories before each of the newest tokens, the oldest first."""

    @property
    def can_join(self) -> bool:
        """Return whether `join` is supported."""
        return True

    def keep_newest(self, columns: int) -> None:
        """Keep a snapshot of the memory before each of the newest tokens.

        Args:
            columns: Number of snapshots.
        """
        self.kept = columns
        self._earlier = deque(self._earlier, maxlen=columns)

    def advance(self, memory: Memory, *, tokens: int) -> None:
        """Replace the memory by the one after some tokens.

        Args:
            memory: Memory after them.
            tokens: Number of them; snapshots are of single tokens.
        """
        if tokens > 1 or self.memory is None:
            self._earlier.clear()
        else:
            self._earlier.append(self.memory)
        self.memory = memory

    def rewind(self, columns: int) -> None:
        """Go back to the snapshot before the newest tokens."""
        if columns and self.memory is not None:
            self.rewind_rows(self.memory[0].new_full((len(self.memory[0]),), columns, dtype=torch.int64), columns)

    def rewind_rows(self, columns: Int[Tensor, "batch"], surplus: int) -> None:  # noqa: ARG002
        """Let each row go back to a snapshot of its own.

        Args:
            columns: Tokens that each row forgets.
            surplus: Not needed, as rows share no columns.

        Raises:
            ConfigurationError: If no snapshots were kept of the tokens.
        """
        most = int(columns.max())
        if self.memory is None or most == 0:
            return
        if most > len(self._earlier):
            raise ConfigurationError(
                f"A recurrent layer cannot go back {most} token(s): it has snapshots of {len(self._earlier)}. Call "
                f"cache.keep_newest({most}) before the tokens are read, or decode without speculation."
            )
        snapshots = [*self._earlier, self.memory]
        at, rows = len(snapshots) - 1 - columns, torch.arange(len(columns), device=columns.device)
        self.memory = tuple(_aligned(values)[at, rows] for values in zip(*snapshots, strict=True))
        self._earlier.clear()

    def join(self, parts: Sequence[tuple[Tensor, "RecurrentState"]], batch_size: int, length: int) -> None:  # noqa: ARG002
        """Take over the memories of others for some of the rows each.

        Args:
            parts: Places in the batch, and the states of the rows there.
            batch_size: Rows of this state.
            length: Not needed, as a memory has no columns.
        """
        memories = [part.memory for _, part in parts]
        order = torch.cat([rows for rows, _ in parts]).argsort()
        assert len(order) == batch_size
        held = [memory for memory in memories if memory is not None]
        self.memory = tuple(_stacked(values)[order] for values in zip(*held, strict=True))

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Keep these rows, in this order."""
        if self.memory is not None:
            self.memory = tuple(values[rows] for values in self.memory)
        kept = [tuple(values[rows] for values in memory) for memory in self._earlier]
        self._earlier = deque(kept, maxlen=self.kept)


def _aligned(values: Sequence[Tensor]) -> Tensor:
    """Stack tensors, [batch, ...] each; histories that have grown meanwhile end together, with zeros before them."""
    longest = max(value.shape[1] for value in values)
    return torch.stack([_padded(value, longest) for value in values])


def _stacked(values: Sequence[Tensor]) -> Tensor:
    longest = max(value.shape[1] for value in values)
    return torch.cat([_padded(value, longest) for value in values])


def _padded(value: Tensor, longest: int) -> Tensor:
    missing = longest - value.shape[1]
    return F.pad(value, (0, 0) * (value.dim() - 2) + (missing, 0)) if missing else value


class RecurrentMixer(MixerModule):
    """Base of the modules; a subclass defines `mix`."""

    def mix(
        self,
        x: Float[Tensor, "batch seq d_model"],
        document_ids: Int[Tensor, "batch seq"] | None,
        memory: Memory | None,
    ) -> tuple[Float[Tensor, "batch seq d_model"], Memory]:
        """Return the outputs of some tokens, and the memory after them.

        Args:
            x: Hidden states.
            document_ids: Documents of the tokens, different in neighbouring ones; ``None`` if each row is one.
            memory: Memory before the first token, of the same document; ``None`` if there were none.
        """
        raise NotImplementedError

    def make_state(self, max_length: int) -> RecurrentState:  # noqa: ARG002
        """Return an empty memory.

        Args:
            max_length: Not needed for a memory of constant size.
        """
        return RecurrentState()

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
        """
        return run(self.mix, x, context, state)


def run(mix: Mix, x: Tensor, context: Context | None, state: RecurrentState | None) -> Tensor:
    """Run a mixer over the tokens of a pass, those of which snapshots are kept one by one.

    Args:
        mix: See `RecurrentMixer.mix`.
        x: Hidden states.
        context: Documents and cache.
        state: Memory of earlier tokens.
    """
    if state is None:
        documents = None if context is None else context.documents
        return mix(x, None if documents is None else documents.ids, None)[0]
    ids, begins = _padding(x, context)
    singles = min(state.kept, x.size(1) - 1)
    sizes = [x.size(1) - singles, *[1] * singles]
    outputs, first = [], 0
    for size in sizes:
        memory = state.memory
        if memory is not None and begins is not None:
            memory = tuple(_emptied(values, begins[:, first]) for values in memory)
        part_ids = None if ids is None else ids[:, first : first + size]
        output, after = mix(x[:, first : first + size], part_ids, memory)
        state.advance(after, tokens=size)
        outputs.append(output)
        first += size
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _padding(x: Tensor, context: Context | None) -> tuple[Tensor | None, Bool[Tensor, "batch seq"] | None]:
    """Return ids that tell padding on the left from text, and the first tokens of texts; ``None`` without padding."""
    cache = None if context is None else context.cache
    if context is None or cache is None or cache.starts is None or cache.length > cache.last_start:
        return None, None
    columns = torch.arange(cache.length, cache.length + x.size(1), device=x.device)
    starts = cache.starts[:, None]
    return (columns >= starts).long(), columns == starts


def _emptied(values: Tensor, rows: Bool[Tensor, "batch"]) -> Tensor:
    return values.masked_fill(rows.view(-1, *[1] * (values.dim() - 1)), 0)

"""Base of the layers that mix tokens, whether they attend or carry a state along."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lightning_lm.models.cache import LayerState
from lightning_lm.models.norms import Norm
from lightning_lm.models.positions import Rope
from lightning_lm.parts import Part

__all__ = ["AttentionShape", "Mixer", "MixerModule"]


class AttentionShape(NamedTuple):
    """One attention layer."""

    width: int
    """Features of all query heads; half the sum of these and the values' where heads of values are of another size."""
    num_heads: int
    """Query heads."""
    window: int | None = None
    """Keys a query sees, itself included; ``None`` for all."""

    def keys(self, context_length: int, *, causal: bool = False) -> float:
        """Return how many keys a query meets, on average over a row.

        Args:
            context_length: Tokens of the row.
            causal: Leave keys after the query out of the count.
        """
        seen = float(min(context_length, self.window or context_length))
        return seen - seen * (seen - 1) / (2 * context_length) if causal else seen


class MixerModule(nn.Module):
    """Base of the modules that mix tokens: ``forward(x, context, state)`` and what the model asks of them."""

    @property
    def is_causal(self) -> bool:
        """Return whether no token depends on later ones."""
        return True

    @property
    def rotary(self) -> tuple[Rope, int] | None:
        """Rotary embedding and the size of the heads it turns; ``None`` without one."""
        return None

    @property
    def attention_shape(self) -> AttentionShape | None:
        """Heads and window; ``None`` for a mixer that scores no pairs of tokens."""
        return None

    def mixing_flops(self, context_length: int, *, causal: bool = False) -> float:
        """Return the FLOPs per token of the forward pass that no weight takes part in.

        Args:
            context_length: Tokens of a row.
            causal: Count only the keys that a query can see.
        """
        shape = self.attention_shape
        return 0.0 if shape is None else 4.0 * shape.width * shape.keys(context_length, causal=causal)

    def make_state(self, max_length: int) -> LayerState:
        """Return an empty memory of earlier tokens.

        Args:
            max_length: Columns that a row will have at most.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Mixer(Part):
    """Base of the layers that carry information from token to token."""

    def build(self, d_model: int, *, norm: Norm) -> MixerModule:
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``.

        Args:
            d_model: Features of the residual stream.
            norm: The model's normalisation, for mixers that normalise inside.
        """
        raise NotImplementedError

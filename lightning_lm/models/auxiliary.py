"""Reports of layers about a training step beside their output: losses of their own, and the loads of experts.

A training module opens `collect_auxiliary` around its loss; every forward pass inside it hands the list to its layers
on `Context`. A report that a checkpointed layer adds when it is computed again goes to a list that nobody reads any
more.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["LayerLoad", "collect_auxiliary", "collected"]


class LayerLoad(NamedTuple):
    """Load of a layer of experts in one forward pass, of the tokens that count."""

    layer: nn.Module
    """The layer, which has ``num_experts``, ``chosen`` and ``end_step``."""
    counts: Int[Tensor, " experts"]
    """Choices of each expert, those included that were dropped."""
    sums: Float[Tensor, "4"]
    """Tokens, choices that were dropped, entropy of the router's distributions (nats), auxiliary loss (nats)."""
    loss: Float[Tensor, ""] | None
    """Sum over tokens that is added to the training loss; ``None`` without one."""


collected: ContextVar[list[LayerLoad] | None] = ContextVar("collected", default=None)
"""The list that layers add to, or ``None`` outside of `collect_auxiliary`."""


@contextlib.contextmanager
def collect_auxiliary() -> Iterator[list[LayerLoad]]:
    """Collect the reports of layers in all forward passes inside, in the order of the passes.

    Example:
        >>> with collect_auxiliary() as loads:
        ...     pass  # loss = loss_of(model, batch)
        >>> len(loads)
        0
    """
    found: list[LayerLoad] = []
    token = collected.set(found)
    try:
        yield found
    finally:
        collected.reset(token)

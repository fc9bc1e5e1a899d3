"""Base of the rules for swapping layers."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["Candidate", "Make", "Rule"]

Make = Callable[..., Tensor]


class Candidate(NamedTuple):
    """A function that may stand in for a method."""

    kernel: str
    call: Callable[..., Any]
    """Takes the module first."""
    falls_back: Callable[..., str | None] | None = None
    """Takes the same arguments; returns why this call needs the layer's own method, ``None`` for most calls."""


class Rule:
    """Rule for layers of one kind: the formulas they may compute, and a way to try them."""

    method = "forward"
    candidates: tuple[Candidate, ...] = ()
    differentiable = 1
    """Inputs that have gradients; they come first."""

    def fits(self, module: nn.Module) -> bool:
        """Return whether a module is of this kind."""
        raise NotImplementedError

    def refusal(self, module: nn.Module) -> str | None:  # noqa: ARG002
        """Return why a module of this kind cannot be exchanged, if it is known without trying."""
        return None

    def inputs(self, module: nn.Module, make: Make) -> tuple[Any, ...]:
        """Return inputs to try the method with.

        Args:
            module: Layer to try.
            make: Takes a shape and returns normal numbers.
        """
        raise NotImplementedError

"""View of an optimizer during a step of several ranks: its own parameters, and in its closure all of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lm.errors import ConfigurationError
from lightning_lm.strategies.zero.ownership import Ownership

__all__ = ["Closure", "OnlyLocal"]


class OnlyLocal:
    """Context in which a wrapped optimizer sees only what this rank updates.

    Args:
        inner: Optimizer that takes the step.
        ownership: Parameters, or rows of them, that this rank updates.
    """

    def __init__(self, inner: Optimizer, ownership: Ownership) -> None:
        self.inner, self.ownership = inner, ownership
        self._whole: list[list[Tensor]] = []
        self._lent: list[Tensor] = []

    def __enter__(self) -> "OnlyLocal":
        for param, rows in self.ownership.rows.items():
            rows.data = self.ownership.local_rows(param, param.detach())  # the parameter may have moved to other memory
            if param.grad is not None:
                rows.grad = self.ownership.local_rows(param, param.grad)
                self._lent.append(rows)
        self._whole = [group["params"] for group in self.inner.param_groups]
        for group in self.inner.param_groups:
            group["params"] = self.ownership.locals(group["params"])
        return self

    def __exit__(self, *_: object) -> None:
        for group, params in zip(self.inner.param_groups, self._whole, strict=True):
            group["params"] = params
        for rows in self._lent:
            rows.grad = None
        self._lent.clear()


class Closure:
    """Closure that is evaluated where the wrapped optimizer asks for it, and sees all parameters.

    Args:
        view: Context of the step, which is left for the evaluation.
        evaluate: Computes gradients and returns the loss.

    Raises:
        ConfigurationError: If it is called twice on several ranks.
    """

    def __init__(self, view: OnlyLocal, evaluate: Callable[[], Any]) -> None:
        self._view, self._evaluate, self._was_called = view, evaluate, False

    def __call__(self) -> Any:
        """Return what the closure returns."""
        if self._was_called and self._view.ownership.num_ranks > 1:
            raise ConfigurationError(
                "The wrapped optimizer evaluates its closure more than once in a step, and between the evaluations "
                'each rank has updated only its own parameters. Use another optimizer, or the strategy "ddp".'
            )
        self._was_called = True
        self._view.__exit__()
        try:
            with torch.enable_grad():
                return self._evaluate()
        finally:
            self._view.__enter__()

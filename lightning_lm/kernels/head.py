"""The output head, some rows at a time: as many as a budget of bytes allows logits for; gradients in float32."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.kernels.vocabulary import Logits

__all__ = ["Head", "HeadGradients", "autocast_dtype", "default_budget", "row_chunks"]

_BUDGETS = {"cpu": 56 * 2**20, "default": 512 * 2**20}
"""Bytes of logits held at once: on a CPU as many as its caches are good for."""


class Head(NamedTuple):
    """Features, the output layer, and what the logits go through."""

    hidden: Float[Tensor, "rows d_model"]
    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None
    targets: Int[Tensor, " rows"]
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100

    def cast(self, dtype: torch.dtype) -> "Head":
        """Return the head with features and weight in the type of the products.

        Args:
            dtype: Of the products.
        """
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))

    def logits(self, rows: slice) -> Logits:
        """Return the logits of some rows.

        Args:
            rows: Which.
        """
        values = self.hidden[rows] @ self.weight.T
        return Logits(values, self.targets[rows], self.bias, self.softcap, self.temperature, self.ignore_index)


def row_chunks(head: Head, budget: int, *, in_place: bool) -> Iterator[slice]:
    """Cut the rows so that the logits of a piece, and all that is made of them, fit into a budget.

    Args:
        head: In the type of the products.
        budget: Bytes.
        in_place: Whether the kernels work in the logits themselves; torch needs six matrices in float32 beside them.
    """
    bytes_per_logit = head.hidden.dtype.itemsize + (0 if in_place else 6 * max(head.hidden.dtype.itemsize, 4))
    size = max(budget // (bytes_per_logit * len(head.weight)), 1)
    size = size // 128 * 128 if size >= 128 else size  # whole tiles of the products
    for start in range(0, len(head.hidden), size):
        yield slice(start, min(start + size, len(head.hidden)))


class HeadGradients:
    """Gradients of features, weight and bias, added up over pieces of rows in float32 or better.

    Args:
        head: In the type of the products.
        needed: Whether features, weight and bias need one.
        budget: Bytes of a product that is added to the gradient of the weight.
    """

    def __init__(self, head: Head, needed: tuple[bool, bool, bool], *, budget: int) -> None:
        self.head, self.budget = head, budget
        precise = torch.promote_types(head.hidden.dtype, torch.float32)
        none = head.hidden.new_empty(0)
        self.hidden = torch.empty_like(head.hidden) if needed[0] else none
        self.weight = torch.zeros_like(head.weight, dtype=precise) if needed[1] else none
        self.bias = none
        if head.bias is not None and needed[2]:
            self.bias = torch.zeros_like(head.bias, dtype=precise)

    def add(self, rows: slice, grad: Float[Tensor, "rows vocab"]) -> None:
        """Add what the gradient of some rows' logits gives.

        Args:
            rows: Which.
            grad: With respect to their logits, in the type of the products.
        """
        if self.bias.numel():
            self.bias += grad.sum(dim=0, dtype=self.bias.dtype)
        if self.hidden.numel():
            torch.mm(grad, self.head.weight, out=self.hidden[rows])
        if not self.weight.numel():
            return
        if grad.dtype == self.weight.dtype:
            self.weight.addmm_(grad.T, self.head.hidden[rows])
            return
        step = max(self.budget // (4 * self.weight.size(1)), 1)
        for start in range(0, len(self.weight), step):
            ids = slice(start, start + step)
            self.weight[ids] += _product(grad[:, ids].T, self.head.hidden[rows])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a product to be added up in float32: not rounded where the device can keep it, rounded once on a CPU."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else a @ b


def autocast_dtype(hidden: Tensor) -> torch.dtype:
    """Return the type that products of some features are to be computed in.

    Args:
        hidden: The features.
    """
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def default_budget(device: torch.device) -> int:
    """Return the bytes of logits that may be held at once on a device.

    Args:
        device: Where the head is.
    """
    return _BUDGETS.get(device.type, _BUDGETS["default"])

"""The output head, some rows at a time: as many as a budget of bytes allows logits for; gradients in float32."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.kernels.lm_head.logits import (
    WORK_BYTES,
    Coefficients,
    Logits,
    Normaliser,
    RowStatistics,
    gradient,
    statistics,
)
from lightning_lm.kernels.lm_head.vocab_parallel import Share, is_split, split_gradient, split_head, split_statistics
from lightning_lm.kernels.runtime.backend import use_triton
from lightning_lm.kernels.runtime.rows import unsupported_dtype
from lightning_lm.protocols import LanguageModel

__all__ = [
    "INPUTS",
    "OPTIONS",
    "Head",
    "HeadGradients",
    "autocast_dtype",
    "empty_gradients",
    "open_head",
    "output_layer",
]

_BUDGETS = {"cpu": 40 * 2**20, "default": 512 * 2**20}
"""Bytes of logits held at once: on a CPU as many as its caches are good for."""
_MIN_ROWS = 256
"""Fewest rows of a piece unless a budget is given: each piece reads all of the weight and of its gradient."""
INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
OPTIONS = (
    "float? softcap, float temperature, bool measured, ScalarType dtype, int budget, bool[] needs, int num_ids,"
    " int stretch, str ranks"
)
"""With `INPUTS`, the fields of `Head` in torch's notation: an operation on a head takes them one by one."""


class Head(NamedTuple):
    """An output layer, the targets of some rows, and what is asked of them."""

    hidden: Float[Tensor, "rows d_model"]
    weight: Float[Tensor, "ids d_model"]
    """One row for each id that this rank has."""
    bias: Float[Tensor, " ids"] | None
    targets: Int[Tensor, " rows"]
    softcap: float | None
    temperature: float
    measured: bool
    """True if entropies and correct predictions are needed."""
    dtype: torch.dtype
    """Data type of the matmuls."""
    budget: int
    """Bytes of logits held at once, with all that is made of them."""
    needs: Sequence[bool]
    """True for each of hidden states, weight and bias that needs a gradient."""
    num_ids: int
    """This and what follows are the fields of a `Share`."""
    stretch: int
    ranks: str

    def cast(self) -> "Head":
        """Return the head with features and weight in the type of the products."""
        return self._replace(hidden=self.hidden.to(self.dtype), weight=self.weight.to(self.dtype))

    def pieces(self, operation: str) -> Iterator[tuple[slice, Logits]]:
        """Yield the logits of as many rows at once as fit into the budget, with all that is made of them.

        Args:
            operation: On whose behalf. Kernels work in the logits themselves; torch makes matrices of some rows more.
        """
        in_place = use_triton(operation, self.hidden.device, unsupported_dtype(self.hidden))
        row_bytes, work = self.dtype.itemsize * self.stretch, 0 if in_place else 24 * self.stretch
        size = max(self.budget // (row_bytes + work), (self.budget - WORK_BYTES) // row_bytes, 1)
        size = size // 128 * 128 if size >= 128 else size  # whole tiles of the products
        for start in range(0, len(self.hidden), size):
            rows = slice(start, start + size)
            # Nothing here may keep these logits while the next are made.
            yield rows, Logits(self.hidden[rows] @ self.weight.T, self.targets[rows], self.bias, *self[4:6])

    def statistics(self, logits: Logits, operation: str, *, averaged: bool = False) -> RowStatistics:
        """Return what losses of some rows need, over the ids of all ranks.

        Args:
            logits: A piece.
            operation: On whose behalf.
            averaged: Compute mean logits; zeros otherwise.
        """
        if self.ranks:
            return split_statistics(logits, Share(*self[-3:]), operation, averaged=averaged, measured=self.measured)
        return statistics(logits, operation, averaged=averaged, measured=self.measured)

    def gradient(self, logits: Logits, normaliser: Normaliser, coefficients: Coefficients, operation: str) -> Tensor:
        """Write the gradient with respect to some logits over them, and return it.

        Args:
            logits: A piece.
            normaliser: Log-normaliser of its rows.
            coefficients: The four numbers of each row.
            operation: On whose behalf.
        """
        if self.ranks:
            return split_gradient(logits, normaliser, coefficients, operation, share=Share(*self[-3:]))
        return gradient(logits, normaliser, coefficients, operation, out=logits.values)


class HeadGradients:
    """Gradients of features, weight and bias, added up over pieces of rows in float32 or better.

    Args:
        head: In the type of the products.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        self.hidden, self.weight, self.bias = empty_gradients(head)

    def add(self, rows: slice, grad: Float[Tensor, "rows ids"]) -> None:
        """Add what the gradient of some rows' logits gives.

        Args:
            rows: Indices of the rows.
            grad: With respect to their logits, in the type of the products.
        """
        needs_hidden, needs_weight, _ = self.head.needs
        if self.bias.numel():
            self.bias += grad.sum(dim=0, dtype=self.bias.dtype)
        if needs_hidden:
            torch.mm(grad, self.head.weight, out=self.hidden[rows])
        if not needs_weight:
            return
        if grad.dtype == self.weight.dtype:
            self.weight.addmm_(grad.T, self.head.hidden[rows])
            return
        step = max(self.head.budget // (4 * self.weight.size(1)), 1)
        for start in range(0, len(self.weight), step):
            ids = slice(start, start + step)
            self.weight[ids] += _product(grad[:, ids].T, self.head.hidden[rows])


def empty_gradients(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for the gradient of features, zeros for those of weight and bias, and nothing where none is needed.

    The first is in the type of the products, the others in float32 or better; autograd casts them to that of what they
    belong to.
    """
    precise = torch.promote_types(head.dtype, torch.float32)
    needs_hidden, needs_weight, needs_bias = head.needs
    hidden = head.hidden.new_empty(head.hidden.shape if needs_hidden else (0,), dtype=head.dtype)
    weight = head.weight.new_zeros(head.weight.shape if needs_weight else (0,), dtype=precise)
    bias = head.weight.new_zeros(len(head.weight) if needs_bias else 0, dtype=precise)
    return hidden, weight, bias


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a product to be added up in float32: not rounded where the device can keep it, rounded once on a CPU."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else a @ b


def output_layer(model: LanguageModel) -> dict[str, Any]:
    """Return what the functions on a head take of a model: ``weight``, ``bias`` and ``softcap``.

    Args:
        model: Turns features into logits by its head, and maybe ``logit_softcap``.
    """
    head = model.head
    return {"weight": _adapted_weight(head), "bias": head.bias, "softcap": getattr(model, "logit_softcap", None)}


def _adapted_weight(head: Any) -> Tensor:
    """Return the weight of an output layer, with the adapters of ``peft`` on it that are switched on and not merged."""
    weight: Tensor = head.weight
    if hasattr(head, "get_delta_weight") and not (head.disable_adapters or head.merged):
        for adapter in head.active_adapters:
            if adapter in head.lora_A:
                weight = weight + head.get_delta_weight(adapter)
    return weight


def open_head(
    hidden: Float[Tensor, "*rows d_model"],
    weight: Float[Tensor, "vocab d_model"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, "*rows"],
    *,
    softcap: float | None,
    temperature: float = 1.0,
    measured: bool = False,
    budget_bytes: int | None = None,
) -> Head:
    """Return what an operation on a head takes.

    Args:
        hidden: Features of each position.
        weight: One row per token id; a DTensor where ranks share them.
        bias: Added to the logits.
        targets: Token ids, or ``IGNORE_INDEX``.
        softcap: Replace the logits by ``softcap * tanh(logits / softcap)``.
        temperature: Divides the logits.
        measured: Compute entropies and correct predictions.
        budget_bytes: Logits held at once, with all that is made of them; at least one row is.
    """
    share = Share(len(weight), len(weight))
    if is_split(weight):
        (hidden, weight, bias), share = split_head(hidden, weight, bias)
    tensors = hidden.reshape(-1, hidden.size(-1)), weight, bias
    needs = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in tensors]
    dtype = autocast_dtype(hidden)
    usual, enough = _BUDGETS.get(hidden.device.type, _BUDGETS["default"]), _MIN_ROWS * dtype.itemsize * share.stretch
    budget = max(usual, enough + WORK_BYTES) if budget_bytes is None else budget_bytes
    return Head(*tensors, targets.flatten(), softcap, temperature, measured, dtype, budget, needs, *share)


def autocast_dtype(hidden: Tensor) -> torch.dtype:
    """Return the type that products of some features are to be computed in.

    Args:
        hidden: The features.
    """
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

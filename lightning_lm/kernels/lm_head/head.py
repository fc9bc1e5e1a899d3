"""Output layer in chunks of rows: as many as a budget of bytes allows logits for; gradients are added up in float32.

An operation on an output layer is an operator of torch, which takes tensors and plain values only: the fields of `Head`
one by one.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.functional.shapes import require_aligned
from lightning_lm.kernels.lm_head.logits import (
    WORK_BYTES,
    Coefficients,
    Logits,
    Normaliser,
    RowStatistics,
    gradient,
    statistics,
)
from lightning_lm.kernels.lm_head.vocab_parallel import VocabShard, local_head, sharded_gradient, sharded_statistics
from lightning_lm.kernels.runtime.backend import unsupported_dtype, use_triton
from lightning_lm.protocols import LanguageModel

__all__ = [
    "INPUTS",
    "OPTIONS",
    "Head",
    "HeadGradients",
    "autocast_dtype",
    "empty_gradients",
    "matmul_flops",
    "open_head",
    "output_layer",
]

_BUDGETS = {"cpu": 40 * 2**20, "default": 512 * 2**20}
"""Bytes of logits held at once; on a CPU they fit into its caches."""
_MIN_ROWS = 256
"""Fewest rows of a chunk unless a budget is given: each chunk reads all of the weight and of its gradient."""
INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
OPTIONS = (
    "float? softcap, float temperature, bool measured, ScalarType dtype, int budget, bool[] needs, int num_ids,"
    " int shard_size, str group_name"
)
"""With `INPUTS`, the fields of `Head` in torch's notation."""


class Head(NamedTuple):
    """Output layer with hidden states and targets, and the settings of its matmuls."""

    hidden: Float[Tensor, "rows d_model"]
    weight: Float[Tensor, "ids d_model"]
    """One row for each id of this rank's shard."""
    bias: Float[Tensor, " ids"] | None
    targets: Int[Tensor, " rows"]
    softcap: float | None
    temperature: float
    measured: bool
    """True if entropies and correct predictions are needed."""
    dtype: torch.dtype
    """Data type of the matmuls."""
    budget: int
    """Bytes of a chunk of logits, with all temporary matrices."""
    needs: Sequence[bool]
    """True for each of hidden states, weight and bias that needs a gradient."""
    num_ids: int
    """Size of the whole vocabulary."""
    shard_size: int
    """Most ids of a rank, the same on all."""
    group_name: str
    """Process group that the vocabulary is sharded over; empty if it is not."""

    @property
    def shard(self) -> VocabShard:
        """This rank's shard of the vocabulary."""
        return VocabShard(self.num_ids, self.shard_size, self.group_name)

    def cast(self) -> "Head":
        """Return the head with hidden states and weight in the data type of the matmuls."""
        return self._replace(hidden=self.hidden.to(self.dtype), weight=self.weight.to(self.dtype))

    def chunks(self, operation: str) -> Iterator[tuple[slice, Logits]]:
        """Yield the logits of as many rows at once as fit into the budget, with all temporary matrices.

        Args:
            operation: Name of the operation. Kernels work in place; torch makes temporary matrices of some rows.
        """
        in_place = use_triton(operation, self.hidden.device, unsupported_dtype(self.hidden))
        row_bytes, work = self.dtype.itemsize * self.shard_size, 0 if in_place else 24 * self.shard_size
        size = max(self.budget // (row_bytes + work), (self.budget - WORK_BYTES) // row_bytes, 1)
        size = size // 128 * 128 if size >= 128 else size  # whole tiles of the matmuls
        for start in range(0, len(self.hidden), size):
            rows = slice(start, start + size)
            # Nothing here may keep these logits while the next are made.
            scale = self.bias, self.softcap, self.temperature
            yield rows, Logits(self.hidden[rows] @ self.weight.T, self.targets[rows], *scale)

    def statistics(self, logits: Logits, operation: str, *, averaged: bool = False) -> RowStatistics:
        """Return the statistics that losses need, over the ids of all ranks.

        Args:
            logits: A chunk.
            operation: Name of the operation.
            averaged: Compute mean logits; zeros otherwise.
        """
        if self.group_name:
            return sharded_statistics(logits, self.shard, operation, averaged=averaged, measured=self.measured)
        return statistics(logits, operation, averaged=averaged, measured=self.measured)

    def gradient(self, logits: Logits, normaliser: Normaliser, coefficients: Coefficients, operation: str) -> Tensor:
        """Overwrite logits by the gradient with respect to them, and return it.

        Args:
            logits: A chunk.
            normaliser: Log-normaliser of its rows.
            coefficients: Coefficients of each row's gradient.
            operation: Name of the operation.
        """
        if self.group_name:
            return sharded_gradient(logits, normaliser, coefficients, operation, shard=self.shard)
        return gradient(logits, normaliser, coefficients, operation, out=logits.values)


class HeadGradients:
    """Gradients of hidden states, weight and bias, added up over chunks of rows in float32 or better.

    Args:
        head: Output layer, cast to the data type of the matmuls.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        self.hidden, self.weight, self.bias = empty_gradients(head)

    def add(self, rows: slice, grad: Float[Tensor, "rows ids"]) -> None:
        """Backpropagate the gradient of a chunk of logits.

        Args:
            rows: Indices of the rows.
            grad: Gradient with respect to their logits, in the data type of the matmuls.
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
            self.weight[ids] += _matmul(grad[:, ids].T, self.head.hidden[rows])


def empty_gradients(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the gradients of hidden states (uninitialised), weight and bias (zeros); empty ones if not needed.

    The first has the data type of the matmuls, the others float32 or better; autograd casts them to that of their
    inputs.
    """
    precise = torch.promote_types(head.dtype, torch.float32)
    needs_hidden, needs_weight, needs_bias = head.needs
    hidden = head.hidden.new_empty(head.hidden.shape if needs_hidden else (0,), dtype=head.dtype)
    weight = head.weight.new_zeros(head.weight.shape if needs_weight else (0,), dtype=precise)
    bias = head.weight.new_zeros(len(head.weight) if needs_bias else 0, dtype=precise)
    return hidden, weight, bias


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a matmul to be added up in float32: not rounded if the device can keep it, rounded once on a CPU."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else a @ b


def output_layer(model: LanguageModel) -> dict[str, Any]:
    """Return a model's ``weight``, ``bias`` and ``softcap``, the arguments of losses on hidden states.

    Args:
        model: Its ``head`` turns hidden states into logits, and ``logit_softcap``, if it has one, bounds them.
    """
    head: Any = model.head
    weight = head.weight
    if hasattr(head, "get_delta_weight") and not (head.disable_adapters or head.merged):  # adapters of peft
        for adapter in head.active_adapters:
            if adapter in head.lora_A:
                weight = weight + head.get_delta_weight(adapter)
    return {"weight": weight, "bias": head.bias, "softcap": getattr(model, "logit_softcap", None)}


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
    """Flatten the rows, find this rank's shard of the vocabulary, and choose data type and budget.

    Args:
        hidden: Hidden states of each position.
        weight: One row per token id; a DTensor if they are sharded over ranks.
        bias: Added to the logits.
        targets: Token ids, or ``IGNORE_INDEX``.
        softcap: Replace the logits by ``softcap * tanh(logits / softcap)``.
        temperature: Divides the logits.
        measured: Compute entropies and correct predictions.
        budget_bytes: Size of a chunk of logits with all temporary matrices; at least one row.
    """
    require_aligned(hidden=hidden, targets=targets)
    shard = VocabShard(len(weight), len(weight))
    if hasattr(weight, "device_mesh"):
        (hidden, weight, bias), shard = local_head(hidden, weight, bias)
    tensors = hidden.reshape(-1, hidden.size(-1)), weight, bias
    needs = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in tensors]
    dtype = autocast_dtype(hidden)
    usual, enough = _BUDGETS.get(hidden.device.type, _BUDGETS["default"]), _MIN_ROWS * dtype.itemsize * shard.size
    budget = max(usual, enough + WORK_BYTES) if budget_bytes is None else budget_bytes
    return Head(*tensors, targets.flatten(), softcap, temperature, measured, dtype, budget, needs, *shard)


def autocast_dtype(hidden: Tensor) -> torch.dtype:
    """Return the data type of matmuls of hidden states: that of autocast, or their own.

    Args:
        hidden: The hidden states.
    """
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def matmul_flops(head: Head) -> int:
    """Return the FLOPs of the logits and of the gradients that are needed.

    Args:
        head: Output layer whose tensors are given by their shapes, as torch's FLOP counter has them.
    """
    shapes: Any = head
    (rows, width), (ids, _) = shapes.hidden, shapes.weight
    return 2 * int(rows) * int(width) * int(ids) * (1 + sum(head.needs[:2]))

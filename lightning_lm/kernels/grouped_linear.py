"""Linear layers of many experts at once: sorted rows, each slice of them multiplied with a matrix of its own.

On a CPU, and where a GPU has no grouped product for the type or the sizes, one product after another writes into the
result; on GPUs torch's grouped product takes all slices in one launch. The gradients are grouped products as well.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.kernels.runtime.backend import use_triton
from lightning_lm.kernels.runtime.operation import Operation

__all__ = ["grouped_linear"]


def grouped_linear(
    x: Float[Tensor, "rows in_features"],
    weight: Float[Tensor, "experts out_features in_features"],
    counts: Int[Tensor, " experts"],
) -> Float[Tensor, "rows out_features"]:
    """Return the product of each row with the matrix of its expert.

    Under autocast the product is computed in its type, as `torch.nn.functional.linear` does.

    Args:
        x: Rows in the order of the experts.
        weight: A matrix per expert.
        counts: Rows of each expert; they add up to the rows.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    return cast(Tensor, _operation(x, weight, counts))


def _is_grouped(x: Tensor, *sizes: int) -> bool:
    """Return whether torch has a grouped product: on GPUs, in bfloat16, with rows of whole 16 bytes."""
    return x.is_cuda and x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)


def _offsets(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=torch.int32)


def _grouped_linear_forward(x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor]:
    use_triton("grouped_linear", x.device, "torch has grouped products")
    if _is_grouped(x, *weight.shape[1:]):
        return (F.grouped_mm(x.contiguous(), weight.mT, offs=_offsets(counts)),)
    out = x.new_empty(len(x), weight.size(1))
    sizes = counts.tolist()
    for rows, matrix, result in zip(x.split(sizes), weight.unbind(), out.split(sizes), strict=True):
        torch.mm(rows, matrix.t(), out=result)
    return (out,)


def _grouped_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    if _is_grouped(x, *weight.shape[1:]):
        offsets, grad = _offsets(counts), grad.contiguous()
        return F.grouped_mm(grad, weight, offs=offsets), F.grouped_mm(grad.mT, x.contiguous(), offs=offsets)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    sizes = counts.tolist()
    slices = zip(grad.split(sizes), x.split(sizes), grad_x.split(sizes), strict=True)
    for (grads, rows, result), matrix, of_matrix in zip(slices, weight.unbind(), grad_weight.unbind(), strict=True):
        torch.mm(grads, matrix, out=result)
        torch.mm(grads.t(), rows, out=of_matrix)
    return grad_x, grad_weight


def _fake_forward(x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor]:
    return (x.new_empty(x.size(0), weight.size(1)),)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Any, Any]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_operation = Operation(
    _grouped_linear_forward,
    _grouped_linear_backward,
    schema="(Tensor x, Tensor weight, Tensor counts) -> Tensor",
    backward_schema="(Tensor grad, Tensor x, Tensor weight, Tensor counts) -> (Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda tensors, _: tensors,
)

"""Linear layers of many experts at once: sorted rows, each slice of them multiplied with a matrix of its own.

On a CPU one product after another writes into the result. On GPUs torch's grouped product takes all slices in one
launch where it knows the type and the sizes, and Triton kernels elsewhere: each tile of rows belongs to one expert, so
an expert without rows costs nothing, no row is padded, and the counts never leave the device. The gradients are grouped
products as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.kernels.runtime.backend import forced_backend, unsupported_dtype, use_triton
from lightning_lm.kernels.runtime.launch import jit, launch
from lightning_lm.kernels.runtime.launch_settings import settings
from lightning_lm.kernels.runtime.operation import Operation

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["grouped_linear", "supported"]


def grouped_linear(
    x: Float[Tensor, "rows in_features"],
    weight: Float[Tensor, "experts out_features in_features"],
    counts: Int[Tensor, " experts"],
    *,
    prefer_triton: bool = False,
) -> Float[Tensor, "rows out_features"]:
    """Return the product of each row with the matrix of its expert.

    Under autocast the product is computed in its type, as `torch.nn.functional.linear` does.

    Args:
        x: Rows in the order of the experts.
        weight: A matrix per expert.
        counts: Rows of each expert; they add up to the rows.
        prefer_triton: Take the Triton kernels also where torch has a grouped product, to compare.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    return cast(Tensor, _operation(x, weight, counts, prefer_triton or forced_backend() == "triton"))


def supported(x: Tensor, weight: Tensor, *, prefer_triton: bool = False) -> str | None:
    """Return why the kernels do not take a product, or nothing if they do.

    Args:
        x: Rows.
        weight: A matrix per expert.
        prefer_triton: Take the kernels also where torch has a grouped product.
    """
    if _is_grouped(x, *weight.shape[1:]) and not prefer_triton:
        return "torch has a grouped product of this type and these sizes"
    return unsupported_dtype(x)


def _is_grouped(x: Tensor, *sizes: int) -> bool:
    """Return whether torch has a grouped product: on GPUs, in bfloat16, with rows of whole 16 bytes."""
    return x.is_cuda and x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)


def _offsets(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=torch.int32)


def _grouped_linear_forward(x: Tensor, weight: Tensor, counts: Tensor, prefer_triton: bool) -> tuple[Tensor]:
    if use_triton("grouped_linear", x.device, supported(x, weight, prefer_triton=prefer_triton)):
        return (_products(x, weight, counts, transposed=False),)
    if _is_grouped(x, *weight.shape[1:]):
        return (F.grouped_mm(x.contiguous(), weight.mT, offs=_offsets(counts)),)
    out = x.new_empty(len(x), weight.size(1))
    sizes = counts.tolist()
    for rows, matrix, result in zip(x.split(sizes), weight.unbind(), out.split(sizes), strict=True):
        torch.mm(rows, matrix.t(), out=result)
    return (out,)


def _grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor, prefer_triton: bool
) -> tuple[Tensor, Tensor]:
    if use_triton("grouped_linear", x.device, supported(x, weight, prefer_triton=prefer_triton)):
        return _products(grad, weight, counts, transposed=True), _weight_gradient(grad, x, weight, counts)
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


def _tiles(x: Tensor, weight: Tensor) -> dict[str, Any]:
    """Return rows and columns of a tile, warps and stages, as many as registers hold, and the precision of products."""
    default = {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if x.dtype == torch.float32:
        default = {"BLOCK": 64, "BLOCK_K": 32, "num_warps": 8 if precision == "ieee" else 4, "num_stages": 2}
    sizes = tuple(weight.shape)
    return {**settings("grouped_linear", sizes, x.dtype, device=x.device, default=default), "PRECISION": precision}


def _products(rows: Tensor, weight: Tensor, counts: Tensor, *, transposed: bool) -> Tensor:
    """Multiply rows with the matrices, whose second axis is summed, or with the transposed ones, as gradients are."""
    rows, weight = (part if part.stride(-1) == 1 else part.contiguous() for part in (rows, weight.contiguous()))
    width = weight.size(2 if transposed else 1)
    out = rows.new_empty(len(rows), width)
    chosen = _tiles(rows, weight)
    most = len(rows) // chosen["BLOCK"] + min(len(counts), len(rows))  # each expert may leave its last tile part full
    tiles = ((counts + chosen["BLOCK"] - 1) // chosen["BLOCK"]).cumsum(0)
    number = torch.arange(most, device=rows.device)
    expert = torch.searchsorted(tiles, number, right=True).int()
    before = torch.cat((tiles.new_zeros(1), tiles))[expert.long()]
    ends = _offsets(counts)
    starts = torch.cat((ends.new_zeros(1), ends))
    first = (starts[expert.long()] + (number - before) * chosen["BLOCK"]).int()
    launch(
        _product_kernel, (most, -(-width // chosen["BLOCK"])),
        rows, weight, out, expert, first, ends, len(counts), rows.stride(0), weight.size(2), weight[0].numel(),
        rows.size(1), width, TRANSPOSED=transposed, **chosen,
    )  # fmt: skip
    return out


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    grad, x = (part if part.stride(-1) == 1 else part.contiguous() for part in (grad, x))
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    chosen = _tiles(x, weight)
    experts, height, width = weight.shape
    launch(
        _weight_kernel, (-(-height // chosen["BLOCK"]), -(-width // chosen["BLOCK"]), experts),
        grad, x, out, _offsets(counts), grad.stride(0), x.stride(0), height, width, **chosen,
    )  # fmt: skip
    return out


@jit
def _product_kernel(
    x_ptr, weight_ptr, out_ptr, expert_ptr, first_ptr, end_ptr, experts, x_row, weight_row, weight_matrix, inner, width,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.load(expert_ptr + tl.program_id(0))
    if expert >= experts:  # the experts fill fewer tiles than there might have been
        return
    rows = tl.load(first_ptr + tl.program_id(0)) + tl.arange(0, BLOCK)
    inside = rows[:, None] < tl.load(end_ptr + expert)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    weight_ptr += expert.to(tl.int64) * weight_matrix
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, inner, BLOCK_K):
        summed = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[:, None].to(tl.int64) * x_row + summed[None, :],
            mask=inside & (summed[None, :] < inner), other=0.0,
        )  # fmt: skip
        if TRANSPOSED:
            matrix = tl.load(
                weight_ptr + summed[:, None].to(tl.int64) * weight_row + columns[None, :],
                mask=(summed[:, None] < inner) & (columns[None, :] < width), other=0.0,
            )  # fmt: skip
        else:
            matrix = tl.trans(tl.load(
                weight_ptr + columns[:, None].to(tl.int64) * weight_row + summed[None, :],
                mask=(columns[:, None] < width) & (summed[None, :] < inner), other=0.0,
            ))  # fmt: skip
        product = tl.dot(x, matrix, product, input_precision=PRECISION)
    place = rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(out_ptr + place, product.to(out_ptr.dtype.element_ty), mask=inside & (columns[None, :] < width))


@jit
def _weight_kernel(
    grad_ptr, x_ptr, out_ptr, end_ptr, grad_row, x_row, height, width,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2)
    begin = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_ptr + expert)
    features = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        grad = tl.load(
            grad_ptr + rows[:, None].to(tl.int64) * grad_row + features[None, :],
            mask=(rows[:, None] < end) & (features[None, :] < height), other=0.0,
        )  # fmt: skip
        x = tl.load(
            x_ptr + rows[:, None].to(tl.int64) * x_row + columns[None, :],
            mask=(rows[:, None] < end) & (columns[None, :] < width), other=0.0,
        )  # fmt: skip
        product = tl.dot(tl.trans(grad), x, product, input_precision=PRECISION)
    place = (expert.to(tl.int64) * height + features[:, None]) * width + columns[None, :]
    inside = (features[:, None] < height) & (columns[None, :] < width)
    tl.store(out_ptr + place, product.to(out_ptr.dtype.element_ty), mask=inside)


def _fake_forward(x: Tensor, weight: Tensor, counts: Tensor, prefer_triton: bool) -> tuple[Tensor]:
    return (x.new_empty(x.size(0), weight.size(1)),)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor, prefer_triton: bool) -> tuple[Any, Any]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_operation = Operation(
    _grouped_linear_forward,
    _grouped_linear_backward,
    schema="(Tensor x, Tensor weight, Tensor counts, bool prefer_triton) -> Tensor",
    backward_schema="(Tensor grad, Tensor x, Tensor weight, Tensor counts, bool prefer_triton) -> (Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda tensors, _: tensors,
)

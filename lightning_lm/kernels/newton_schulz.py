"""Products that are symmetric, for Muon's Newton-Schulz iteration: one triangle is computed, the other is its mirror.

``A = X X'`` and ``b A + c A A`` are both of the form ``beta added + alpha x x'`` (``A`` is its own transpose), so two
of the three products of an iteration cost half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lm.kernels.runtime.backend import register, unsupported_dtype, use_triton
from lightning_lm.kernels.runtime.launch import jit, launch
from lightning_lm.kernels.runtime.launch_settings import settings

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["LEAST_ROWS", "supported", "symmetric_product"]

LEAST_ROWS = 1024
"""Rows from which half of the work is less than what torch's products do; below there are too few tiles."""
register("newton_schulz", functions=["symmetric_product"])


def symmetric_product(
    x: Float[Tensor, "batch rows columns"],
    added: Float[Tensor, "batch rows rows"] | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    least_rows: int = LEAST_ROWS,
) -> Float[Tensor, "batch rows rows"]:
    """Return ``alpha x x' + beta added``, summed in float32; there is no gradient.

    Args:
        x: Matrices; in the second product of an iteration symmetric ones.
        added: Symmetric matrices; ``None`` for nothing.
        alpha: Scale of the product.
        beta: Scale of what is added.
        least_rows: Below it torch multiplies.

    Source:
        Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    if not use_triton("newton_schulz", x.device, supported(x, least_rows)):
        return alpha * (x @ x.mT) if added is None else torch.baddbmm(added, x, x.mT, beta=beta, alpha=alpha)
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, rows, columns = x.shape
    out = torch.empty(batch, rows, rows, dtype=x.dtype, device=x.device)
    other = out if added is None else added.contiguous()
    precision: Literal["ieee", "tf32"] = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    chosen = _tiles(x, precision)
    tiles = -(-rows // chosen["BLOCK"])
    launch(
        _symmetric_kernel, (tiles, tiles, batch),
        x, other, out, x.stride(0), x.stride(1), rows, columns, alpha, beta,
        ADDED=added is not None, PRECISION=precision, **chosen,
    )  # fmt: skip
    return out


def supported(x: Tensor, least_rows: int = LEAST_ROWS) -> str | None:
    """Return why the kernel does not take matrices, or nothing if it does.

    Args:
        x: [batch, rows, columns].
        least_rows: Below it torch multiplies.
    """
    if x.size(-2) < least_rows:
        return f"matrices of {x.size(-2)} rows are below {least_rows}"
    return unsupported_dtype(x)


def _tiles(x: Tensor, precision: Literal["ieee", "tf32"]) -> dict[str, int]:
    """Return rows and columns of a tile, warps and stages: as many as registers hold."""
    default = {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    if x.dtype == torch.float32:
        default = {"BLOCK": 64, "BLOCK_K": 32, "num_warps": 8 if precision == "ieee" else 4, "num_stages": 2}
    return settings("newton_schulz", tuple(x.shape[-2:]), x.dtype, device=x.device, default=default)


@jit
def _symmetric_kernel(
    x_ptr, added_ptr, out_ptr, x_batch, x_row, num_rows, num_columns, alpha, beta,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) < tl.program_id(0):  # the mirror of another tile
        return
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK_K)
    x_ptr += batch * x_batch
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, num_columns, BLOCK_K):
        inside = start + inner[None, :] < num_columns
        left = tl.load(
            x_ptr + rows[:, None].to(tl.int64) * x_row + start + inner[None, :],
            mask=inside & (rows[:, None] < num_rows), other=0.0,
        )  # fmt: skip
        right = tl.load(
            x_ptr + columns[:, None].to(tl.int64) * x_row + start + inner[None, :],
            mask=inside & (columns[:, None] < num_rows), other=0.0,
        )  # fmt: skip
        product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
    product = product * alpha
    place = batch * num_rows * num_rows + rows[:, None].to(tl.int64) * num_rows + columns[None, :]
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_rows)
    if ADDED:
        product += beta * tl.load(added_ptr + place, mask=inside, other=0.0).to(tl.float32)
    product = product.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, product, mask=inside)
    mirror = batch * num_rows * num_rows + columns[:, None].to(tl.int64) * num_rows + rows[None, :]
    inside = (columns[:, None] < num_rows) & (rows[None, :] < num_rows)
    tl.store(out_ptr + mirror, tl.trans(product), mask=inside)

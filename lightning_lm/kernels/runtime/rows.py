"""Base of row-wise and elementwise kernels: division of tensors into programs."""

import torch
from torch import Tensor

from lightning_lm.kernels.runtime.backend import unsupported_dtype
from lightning_lm.kernels.runtime.launch import next_power_of_two
from lightning_lm.kernels.runtime.launch_settings import settings

__all__ = [
    "partial_sums",
    "pieces",
    "row_settings",
    "rows_of",
    "unsupported_rows",
]

LONGEST_ROW = 8192
"""Features of a row that fits into the registers of one program: at twice as many the gradients of norms spill."""


def rows_of(x: Tensor) -> Tensor:
    """Return a tensor as a matrix whose rows are contiguous; copied only where it must be.

    Args:
        x: Features on the last axis.
    """
    rows = x.reshape(-1, x.size(-1))
    return rows if rows.stride(1) == 1 else rows.contiguous()


def unsupported_rows(x: Tensor, longest: int = LONGEST_ROW) -> str | None:
    """Return why kernels cannot take the rows of a tensor, or nothing if they can.

    Args:
        x: Features on the last axis.
        longest: Most features of a row.
    """
    if x.ndim == 0 or not 0 < x.size(-1) <= longest:
        return f"shape {tuple(x.shape)}: the last axis must have 1 to {longest} features"
    return unsupported_dtype(x)


def row_settings(operation: str, size: int, x: Tensor) -> dict[str, int]:
    """Return how many rows and warps a program takes: 16 numbers a thread, so that gradients do not spill.

    Args:
        operation: Name of the kernel.
        size: Features of a row.
        x: Input of the kernel.
    """
    block = next_power_of_two(size)
    rows = max(1, 2048 // block)
    default = {"ROWS": rows, "num_warps": min(max(rows * block // 512, 4), 16)}
    return settings(operation, (size,), x.dtype, device=x.device, default=default)


def pieces(operation: str, *tensors: Tensor) -> tuple[list[Tensor], tuple[int], dict[str, int]]:
    """Return tensors of one shape as matrices for elementwise kernels, the grid, and ``blocks`` with the settings.

    A matrix has contiguous rows, a single one if all tensors are contiguous; each row takes ``blocks`` programs.

    Args:
        operation: Name of the kernel.
        *tensors: Inputs of the kernel.
    """
    whole = all(tensor.is_contiguous() for tensor in tensors)
    matrices = [tensor.view(1, -1) if whole else rows_of(tensor) for tensor in tensors]
    first, default = tensors[0], {"BLOCK": 1024, "num_warps": 4}
    chosen = settings(operation, tuple(first.shape[-1:]), first.dtype, device=first.device, default=default)
    blocks = -(-matrices[0].size(1) // chosen["BLOCK"])
    return matrices, (len(matrices[0]) * blocks,), {"blocks": blocks, **chosen}


def partial_sums(rows: Tensor, chosen: dict[str, int]) -> tuple[int, int, Tensor]:
    """Return the number of programs, the rows of each, and an empty row for the partial sum of each.

    A gradient that is a sum over all rows is added up per program and then over programs, always in the same order:
    there are no atomics, so a run can be repeated bit for bit.

    Args:
        rows: A matrix.
        chosen: Launch settings; ``PROGRAMS``, if there, is taken out.
    """
    most = chosen.pop("PROGRAMS", 264)  # two for each multiprocessor of an H100
    per_program = max(-(-len(rows) // most), 1)
    per_program = -(-per_program // chosen["ROWS"]) * chosen["ROWS"]
    programs = -(-len(rows) // per_program)
    return programs, per_program, torch.empty(programs, rows.size(1), dtype=torch.float32, device=rows.device)

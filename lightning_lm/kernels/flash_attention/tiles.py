"""Tiles of the kernels of `flash_attention`: as large as registers and shared memory allow, compiled and counted.

Nothing here was timed on a GPU; ``lightning-lm kernels tune flash_attention`` does that and overrides these rules.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_lm.kernels.runtime.backend import architecture
from lightning_lm.kernels.runtime.launch import triton_version
from lightning_lm.kernels.runtime.launch_settings import settings

__all__ = ["precision", "tiles"]

Tile = tuple[int, int, int, int]
Kind = Literal["small", "hopper", "blackwell", "tf32", "ieee"]
_NAMES = ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")
_FORWARD, _QUERIES, _KEYS = "flash_attention", "flash_attention_queries", "flash_attention_keys"
_TILES: dict[tuple[str, Kind], tuple[Tile, Tile]] = {
    # half precision; heads up to 64 features, larger heads
    (_FORWARD, "small"): ((128, 64, 8, 2), (128, 64, 8, 2)),
    (_FORWARD, "hopper"): ((128, 64, 8, 3), (128, 64, 8, 3)),
    (_FORWARD, "blackwell"): ((128, 64, 8, 3), (128, 64, 8, 3)),
    (_QUERIES, "small"): ((128, 64, 8, 2), (64, 32, 8, 2)),
    (_QUERIES, "hopper"): ((64, 64, 4, 2), (128, 64, 8, 2)),
    (_QUERIES, "blackwell"): ((64, 64, 8, 2), (128, 64, 8, 2)),
    (_KEYS, "small"): ((32, 64, 8, 2), (32, 64, 8, 2)),
    (_KEYS, "hopper"): ((64, 64, 8, 2), (32, 64, 8, 2)),
    (_KEYS, "blackwell"): ((64, 64, 8, 2), (16, 64, 8, 2)),
    # single precision; by tensor cores that round to tf32, and by ordinary multiplications
    (_FORWARD, "tf32"): ((64, 32, 4, 1), (64, 32, 4, 1)),
    (_QUERIES, "tf32"): ((32, 32, 4, 1), (32, 32, 4, 1)),
    (_KEYS, "tf32"): ((32, 32, 4, 1), (32, 32, 4, 1)),
    (_FORWARD, "ieee"): ((32, 32, 4, 1), (16, 16, 4, 1)),
    (_QUERIES, "ieee"): ((16, 16, 4, 1), (16, 16, 8, 1)),
    (_KEYS, "ieee"): ((16, 16, 4, 1), (16, 16, 4, 1)),
}
_FIRST_TRITON: dict[tuple[str, Kind, bool], Tile] = {
    # what spills in Triton 3.6, and no longer in 3.9; the last is whether a head is above 64
    (_FORWARD, "small", True): (128, 32, 8, 2),
    (_KEYS, "small", False): (16, 64, 8, 2),
    (_KEYS, "hopper", False): (32, 64, 8, 2),
    (_KEYS, "blackwell", False): (32, 64, 8, 2),
}
_BLACKWELL_FORWARD = (64, 32, 8, 1)
"""For large heads in tf32: there 4 warps spill."""


def tiles(kernel: str, query: Tensor) -> dict[str, int]:
    """Return the queries and keys of a tile, the warps, and the stages of the pipeline.

    Args:
        kernel: ``flash_attention``, or with ``_queries`` or ``_keys`` for their gradients.
        query: Queries.
    """
    chip = architecture(query.device)
    kind, large = _kind(query, chip), query.size(-1) > 64
    found = _TILES[kernel, kind][large]
    if triton_version() in ("3.6", "3.7", "3.8"):
        found = _FIRST_TRITON.get((kernel, kind, large), found)
    if kind == "tf32" and large and kernel == _FORWARD and _is_blackwell(chip):
        found = _BLACKWELL_FORWARD
    default = dict(zip(_NAMES, found, strict=True))
    return settings(kernel, (query.size(-1),), query.dtype, device=query.device, default=default)


def precision() -> Literal["ieee", "tf32"]:
    """Return how products in float32 are rounded: as torch is told to round its own."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _kind(query: Tensor, chip: str) -> Kind:
    """Return which tiles fit: 99 kB of shared memory are enough for the small ones, the others take up to 227."""
    if query.dtype.itemsize > 2:
        return "tf32" if chip == "none" else precision()  # an interpreter has no registers
    if _is_blackwell(chip):
        return "blackwell"
    return "hopper" if chip == "sm_90" else "small"


def _is_blackwell(chip: str) -> bool:
    return chip in ("sm_100", "sm_103")

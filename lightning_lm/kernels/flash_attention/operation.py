"""FlashAttention-2: causal attention over intervals of keys, without the matrix of scores and without atomics.

`lightning_lm.functional.flash_attention` is the same in plain torch, to be read first, and the reference here. Packed
documents and sliding windows are one mask: the first key that each query sees. Tiles of keys outside of it are not
visited, so the work follows the pairs that are seen. The gradients of keys are summed by one program per tile of keys,
over the heads that share them, in a fixed order: a run can be repeated bit for bit.

Tiles are as large as registers and shared memory allow, compiled and counted; none was timed on a GPU.
``lightning-lm kernels tune flash_attention`` measures them on the device at hand and overrides these rules.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.functional.attention import require_heads
from lightning_lm.functional.flash_attention import FlashOptions, flash_backward, flash_forward
from lightning_lm.kernels.flash_attention.triton_kernels import forward_kernel, key_kernel, query_kernel
from lightning_lm.kernels.lm_head.head import autocast_dtype
from lightning_lm.kernels.runtime.backend import architecture, unsupported_dtype, use_triton
from lightning_lm.kernels.runtime.flop_formulas import flop_formula
from lightning_lm.kernels.runtime.launch import launch, next_power_of_two, triton_version
from lightning_lm.kernels.runtime.launch_settings import settings
from lightning_lm.kernels.runtime.operation import Operation

__all__ = ["flash_attention", "precision", "supported", "tiles"]

_LARGEST_HEAD = 128
"""Features of a head for which two tiles of sums stay in registers."""
_REFERENCE_BLOCK = 256
"""Queries and keys of a tile of the reference."""


def flash_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    *,
    first: Int[Tensor, "#batch queries"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Attend from each query to the keys between its first one and its own place.

    Args:
        query: The last of the keys; ``heads`` is a multiple of ``kv_heads``.
        key: One per column seen so far.
        value: Like ``key``.
        first: First key that each query sees, never less than that of the query before, from `first_visible`; ``None``
            for the very first. A query whose interval is empty gets zeros.
        softcap: Scores are squeezed to ``softcap * tanh(score / softcap)``.
        scale: Multiplies the scores; ``None`` for ``1 / sqrt(head_dim)``.

    Source:
        Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
    """
    require_heads(query, key, value)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    dtype = autocast_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return cast(Tensor, _operation(query, key, value, first, (scale, softcap or 0.0)))


def supported(query: Tensor, key: Tensor) -> str | None:
    """Return why the kernels cannot take queries and keys, or nothing if they can.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, keys, head_dim].
    """
    if query.size(-1) > _LARGEST_HEAD:
        return f"head_dim={query.size(-1)} is above {_LARGEST_HEAD}"
    if query.dtype != key.dtype:
        return f"queries are {query.dtype} and keys {key.dtype}"
    if query.size(2) > key.size(2) or query.size(1) % key.size(1):
        return f"{query.size(1)} heads of {query.size(2)} queries on {key.size(1)} heads of {key.size(2)} keys"
    return unsupported_dtype(query)


def _constants(query: Tensor, key: Tensor, first: Tensor | None, softcap: float) -> dict[str, Any]:
    return {
        "GROUP": query.size(1) // key.size(1),
        "SIZE": query.size(-1),
        "BLOCK_D": max(next_power_of_two(query.size(-1)), 16),
        "FIRST": first is not None,
        "SOFTCAP": softcap > 0,
        "PRECISION": precision(),
    }


def _factors(scale: float, softcap: float) -> tuple[float, float]:
    """Return what products are multiplied with, before and after the squeeze, so that scores are in base 2."""
    to_base_2 = 1 / math.log(2)
    return (scale / softcap, softcap * to_base_2) if softcap else (scale * to_base_2, 1.0)


def _flash_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    if not use_triton("flash_attention", query.device, supported(query, key)):
        options = FlashOptions(scale=scales[0], softcap=scales[1] or None, block=_REFERENCE_BLOCK)
        out, lse = flash_forward(query, key, value, first, options)
        return _rows_first(out), lse
    out, lse = _fake_forward(query, key, value)
    query, key, value = (_dense(x) for x in (query, key, value))
    batch, heads, queries, _ = query.shape
    chosen = tiles("flash_attention", query)
    launch(
        forward_kernel, (-(-queries // chosen["BLOCK_Q"]), batch * heads),
        query, key, value, query if first is None else first, out, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], _row_stride(first), heads, queries, key.size(2),
        *_factors(*scales), **_constants(query, key, first, scales[1]), **chosen,
    )  # fmt: skip
    return out, lse


def _flash_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, out: Tensor, lse: Tensor,
    scales: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not use_triton("flash_attention", query.device, supported(query, key)):
        options = FlashOptions(scale=scales[0], softcap=scales[1] or None, block=_REFERENCE_BLOCK)
        grads = flash_backward(grad, query, key, value, (first, out, lse), options)
        return _rows_first(grads[0]), _rows_first(grads[1]), _rows_first(grads[2])
    grad_query, grad_key, grad_value = _fake_backward(grad, query, key, value)
    grad, query, key, value = (_dense(x) for x in (grad, query, key, value))
    batch, heads, queries, _ = query.shape
    along, constants = torch.empty_like(lse), _constants(query, key, first, scales[1])
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3], _row_stride(first))
    given, factors = query if first is None else first, (scales[0], *_factors(*scales))
    chosen = tiles("flash_attention_queries", query)
    launch(
        query_kernel, (-(-queries // chosen["BLOCK_Q"]), batch * heads),
        query, key, value, given, out, grad, lse, along, grad_query, *strides, heads, queries, key.size(2),
        *factors, **constants, **chosen,
    )  # fmt: skip
    last, chosen = _last_queries(first, key.size(2)), tiles("flash_attention_keys", query)
    launch(
        key_kernel, (-(-key.size(2) // chosen["BLOCK_K"]), batch * key.size(1)),
        query, key, value, given, given if last is None else last, grad, lse, along, grad_key, grad_value, *strides,
        _row_stride(last), key.size(1), queries, key.size(2), *factors, **constants, **chosen,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


def _last_queries(first: Tensor | None, keys: int) -> Tensor | None:
    """Return for each key how many queries begin no later than it: none from there on sees it."""
    if first is None:
        return None
    columns = torch.arange(keys, device=first.device, dtype=first.dtype).expand(first.size(0), keys)
    return torch.searchsorted(first.contiguous(), columns.contiguous(), right=True, out_int32=True)


def _row_stride(numbers: Tensor | None) -> int:
    """Return the distance between rows; rows that are shared are one."""
    return 0 if numbers is None or numbers.size(0) == 1 else numbers.stride(0)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_first(x: Tensor) -> Tensor:
    """Lay out as [batch, queries, heads, head_dim], so that heads can be joined without a copy."""
    laid_out = _like_rows_first(x)
    return laid_out.copy_(x)


def _like_rows_first(x: Tensor) -> Tensor:
    batch, heads, rows, size = x.shape
    return x.new_empty(batch, rows, heads, size).transpose(1, 2)


def _fake_forward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    accurate = torch.promote_types(query.dtype, torch.float32)
    return _like_rows_first(query), query.new_empty(query.shape[:-1], dtype=accurate)


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like_rows_first(query), _like_rows_first(key), _like_rows_first(value)


_operation = Operation(
    _flash_attention_forward,
    _flash_attention_backward,
    schema="(Tensor query, Tensor key, Tensor value, Tensor? first, float[] scales) -> (Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? first, Tensor out, Tensor lse,"
    " float[] scales) -> (Tensor, Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda tensors, results: (*tensors, *results),
)


@flop_formula(torch.ops.lightning_lm.flash_attention)
def _flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Count two products over all pairs, as torch does for its own attention, whatever the mask."""
    batch, heads, queries, size = query
    return int(4 * batch * heads * queries * key[2] * size)


@flop_formula(torch.ops.lightning_lm.flash_attention_backward)
def _backward_flops(grad: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Count five: the scores again, and the gradients of weights, values, queries and keys."""
    return _flops(query, key) // 2 * 5


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

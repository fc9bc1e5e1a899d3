"""Choice of the attention implementation, by device and shape; models make it at each call.

* CPU: documents one by one and windows in blocks, as `functional.attention` folds them.
* GPU, packed documents, a window or a soft cap: `flash_attention`, which visits no tile that is masked. Torch would
  need a mask of all pairs, and FlexAttention a compilation and a block mask for every batch.
* GPU, plain causal in half precision: cuDNN from Hopper on, which is faster than anything Triton can do there;
  FlashAttention before it.
* Everything else (a cache, plain causal in single precision, dropped weights, large heads): `functional.attention`,
  where packed documents on a GPU cost a mask of all pairs. The report says why it was taken.
"""

import functools
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_lm.functional.attention import (
    Documents,
    bidirectional_attention,
    causal_attention,
    first_visible,
    require_heads,
)
from lightning_lm.kernels.flash_attention.operation import flash_attention, supported
from lightning_lm.kernels.runtime.backend import architecture, register, unavailable, use_triton

__all__ = ["attention"]

_FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
register("attention")


def attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys v_dim"],
    *,
    mask: Documents | Bool[Tensor, "#batch 1 queries keys"] | None = None,
    window: int | None = None,
    causal: bool = True,
    **options: Any,
) -> Float[Tensor, "batch heads queries v_dim"]:
    """Attend as `functional.attention.causal_attention` does, by what is fastest for the device and the shape.

    Args:
        query: The last of the keys; ``heads`` is a multiple of ``kv_heads``.
        key: One per column seen so far.
        value: One per key; its features may be of another number.
        mask: `Documents` confines each query to its own document; a boolean tensor decides everything.
        window: Number of keys a query sees, itself included; ``None`` for all.
        causal: Queries see no later keys; otherwise `functional.attention.bidirectional_attention` attends.
        **options: ``softcap``, ``scale`` and ``dropout`` of `causal_attention`.
    """
    if not causal:
        return bidirectional_attention(query, key, value, mask=mask, window=window, **options)
    require_heads(query, key, value)
    window = None if window is None or window >= key.size(2) else window
    softcap, scale, dropout = options.get("softcap"), options.get("scale"), options.get("dropout", 0.0)
    reason = _reason_against(query, key, value, mask, dropout) or _plain(query, mask, window, softcap)
    if _ours(query.device, reason):
        first = _first_keys(mask, window, query)
        return flash_attention(query, key, value, first=first, softcap=softcap, scale=scale)
    if mask is None and window is None and softcap is None and query.size(2) == key.size(2) and _has_cudnn(query):
        with sdpa_kernel(_FASTEST, set_priority=True):
            return causal_attention(query, key, value, **options)
    return causal_attention(query, key, value, mask=mask, window=window, **options)


def _reason_against(
    query: Tensor, key: Tensor, value: Tensor, mask: Documents | Tensor | None, dropout: float
) -> str | None:
    """Return why our kernel cannot run, or nothing if it can."""
    if dropout:
        return f"dropout={dropout} of attention weights"
    if query.size(2) != key.size(2) or isinstance(mask, Tensor):
        return "queries over a cache of keys"
    if isinstance(mask, Documents) and mask.prefixes is not None:
        return "documents that continue others"
    if isinstance(mask, Documents) and mask.prefix_lengths is not None:
        return "prefixes that see each other in both directions"
    if value.size(-1) != key.size(-1):
        return f"values of {value.size(-1)} features and keys of {key.size(-1)}"
    return supported(query, key)


def _plain(query: Tensor, mask: Documents | Tensor | None, window: int | None, softcap: float | None) -> str | None:
    """Return why our kernel need not run: torch has one that is as fast or faster, unless something is masked."""
    if mask is not None or window is not None or softcap is not None or query.device.type != "cuda":
        return None
    return "plain causal: cuDNN is faster" if _has_cudnn(query) else "plain causal: torch's FlashAttention is as fast"


def _ours(device: torch.device, reason: str | None) -> bool:
    if torch.compiler.is_compiling():  # a compiler cannot follow what is remembered for the report
        return reason is None and _available(device)
    return use_triton("attention", device, reason)


def _available(device: torch.device) -> bool:
    return unavailable(device) is None


# A compiler asks this once and does not look inside. `torch.compiler.assume_constant_result` sets this very attribute,
# but loads the whole compiler first.
_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_cudnn(query: Tensor) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and query.device.type == "cuda" and _is_hopper_or_later(query.device)


def _is_hopper_or_later(device: torch.device) -> bool:
    return architecture(device) in ("sm_90", "sm_100", "sm_103")


_is_hopper_or_later._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _first_keys(mask: Documents | Tensor | None, window: int | None, query: Tensor) -> Tensor | None:
    if isinstance(mask, Documents):
        return mask.first_keys(window)
    return None if window is None else _window_starts(query.size(2), window, query.device)


@functools.lru_cache(maxsize=8)
def _window_starts(queries: int, window: int, device: torch.device) -> Tensor:
    return first_visible(torch.zeros(1, queries, dtype=torch.int32, device=device), window)

"""Choice of the implementation of a linear recurrence, by device, type and what is installed.

* CPU: `functional.linear_recurrence`, the readable form.
* GPU, half precision, flash-linear-attention installed: its kernels, which do a whole chunk in shared memory.
* GPU otherwise: chunks as batched products of torch, and `scan_chunks` from chunk to chunk.

``lightning-lm kernels report`` says which it was, and why not flash-linear-attention.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.functional.linear_recurrence import linear_recurrence as formula
from lightning_lm.kernels.recurrence.chunk_scan import scan_chunks
from lightning_lm.kernels.recurrence.flash_linear_attention import run_flash_linear_attention, unsupported
from lightning_lm.kernels.runtime.backend import forced_backend, register, use_triton

__all__ = ["linear_recurrence"]

register("flash_linear_attention", functions=["linear_recurrence"])


def linear_recurrence(
    q: Float[Tensor, "batch seq key_heads key_dim"],
    k: Float[Tensor, "batch seq key_heads key_dim"],
    v: Float[Tensor, "batch seq heads value_dim"],
    log_decay: Float[Tensor, "batch seq heads *key_dim"] | None = None,
    *,
    beta: Float[Tensor, "batch seq heads"] | None = None,
    document_ids: Int[Tensor, "batch seq"] | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
) -> tuple[Float[Tensor, "batch seq heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """Run the recurrence of `functional.linear_recurrence` by what is fastest for the device and the type.

    Args:
        q: Queries. Neighbouring heads of values share a head of queries and keys if there are fewer of these.
        k: Keys.
        v: Values.
        log_decay: Natural logarithm of the decay before each token is written, at most 0: one per head, or one for each
            key feature. ``None`` for no decay.
        beta: Writing strength of the delta rule, whose keys should have length one; ``None`` for linear attention.
        document_ids: Equal inside a document; the state starts at zero in each. ``None`` if each row is one.
        state: Memory of the first token's document before it; ``None`` for an empty one.

    Returns:
        The outputs, and the state after the last token, in float32 or better.

    Source:
        See `functional.linear_recurrence.chunked_recurrence`.
    """
    given = {"beta": beta, "document_ids": document_ids, "state": state}
    if _theirs(q, v, log_decay, given):
        return run_flash_linear_attention(q, k, v, log_decay, **given)
    on_gpu = q.device.type == "cuda" or forced_backend() == "triton"
    return formula(q, k, v, log_decay, **given, scan=scan_chunks if on_gpu else None)


def _theirs(q: Tensor, v: Tensor, log_decay: Tensor | None, given: dict[str, Tensor | None]) -> bool:
    """Return whether flash-linear-attention runs the recurrence; no compiler can look into what is remembered."""
    if torch.compiler.is_compiling() or forced_backend() == "triton" or q.size(1) == 1:
        return False
    return use_triton("flash_linear_attention", q.device, unsupported(q, v, log_decay, **given))

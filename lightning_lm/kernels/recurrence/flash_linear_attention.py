"""The kernels of flash-linear-attention (0.6), where that package is installed; it is imported at the first call."""

import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lm.functional.linear_recurrence import number_documents

__all__ = ["is_installed", "run_flash_linear_attention", "unsupported"]

_LARGEST_KEY = 256
_KERNELS = {
    (True, 3): ("gated_delta_rule", "chunk_gated_delta_rule"),
    (True, 0): ("delta_rule", "chunk_delta_rule"),
    (False, 3): ("simple_gla", "chunk_simple_gla"),
    (False, 4): ("gla", "chunk_gla"),
}
"""Module and function, by whether the delta rule writes and by the axes of the decay."""


def is_installed() -> bool:
    """Return whether the package can be imported."""
    return importlib.util.find_spec("fla") is not None


def unsupported(
    q: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    beta: Tensor | None,
    document_ids: Tensor | None,
    state: Tensor | None,
) -> str | None:
    """Return why the package does not run a recurrence, or nothing if it can.

    Args:
        q: Queries.
        v: Values.
        log_decay: Logarithm of the decays.
        beta: Writing strength of the delta rule.
        document_ids: Documents of packed rows.
        state: Memory before the first token.
    """
    if not is_installed():
        return "flash-linear-attention is not installed (pip install flash-linear-attention)"
    if v.dtype not in (torch.float16, torch.bfloat16):
        return f"values are {v.dtype}, and flash-linear-attention computes in float16 or bfloat16"
    if _kind(log_decay, beta) not in _KERNELS:
        return "flash-linear-attention has no such recurrence: " + (
            "sums without a decay" if beta is None else "the delta rule with decays of key features"
        )
    if q.size(-1) > _LARGEST_KEY:
        return f"keys of {q.size(-1)} features are above {_LARGEST_KEY}"
    if document_ids is not None and state is not None:
        return "a state from before the first of several documents"
    return None


def _kind(log_decay: Tensor | None, beta: Tensor | None) -> tuple[bool, int]:
    return beta is not None, 0 if log_decay is None else log_decay.dim()


def run_flash_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    beta: Tensor | None,
    document_ids: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the outputs, and the state after the last token, as `functional.linear_recurrence` does.

    Args:
        q: Queries, rounded to the type of the values.
        k: Keys, rounded too.
        v: Values, float16 or bfloat16.
        log_decay: Logarithm of the decays.
        beta: Writing strength of the delta rule.
        document_ids: Documents of packed rows, which become sequences of one long row.
        state: Memory before the first token.
    """
    module, name = _KERNELS[_kind(log_decay, beta)]
    groups = v.size(2) // k.size(2)
    q, k = (x.to(v.dtype).repeat_interleave(groups, 2) for x in (q, k))
    named = {"q": q, "k": k, "v": v, "g": log_decay, "beta": beta}
    tensors = {key: x for key, x in named.items() if x is not None}
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
    lasts: Tensor | None = None
    if document_ids is not None:
        tensors = {key: x.flatten(0, 1)[None] for key, x in tensors.items()}
        options["cu_seqlens"], lasts = _sequences(document_ids)
    elif state is not None:
        options["initial_state"] = state.float()
    kernel = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    with torch.autocast(q.device.type, enabled=False):
        mixed, after = kernel(**{key: x.contiguous() for key, x in tensors.items()}, **options)
    return mixed.view(v.shape).to(v.dtype), (after if lasts is None else after[lasts]).float()


def _sequences(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the documents of all rows begin, and the end of the last one, and the last document of each row."""
    numbers = number_documents(document_ids)
    firsts = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True).flatten().nonzero()[:, 0]
    lasts = (numbers[:, -1] + 1).cumsum(0) - 1
    return F.pad(firsts, (0, 1), value=numbers.numel()), lasts

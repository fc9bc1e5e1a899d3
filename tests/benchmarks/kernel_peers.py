"""Other people's kernels, imported when they are first called, so that one that is not installed is a line."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def liger(name: str, *options: Any, **named: Any) -> Callable[..., Any]:
    """Return a function of Liger-Kernel 0.8.5, with options after its tensors."""

    def call(*tensors: Any) -> Any:
        import liger_kernel.transformers.functional as functional

        return getattr(functional, f"liger_{name}")(*tensors, *options, **named)

    return call


def liger_rope(cos: Tensor, sin: Tensor) -> Callable[..., Any]:
    """Return Liger's rotation of [batch, seq, heads, head_dim]; its sines all have the same sign."""
    half = sin.size(-1) // 2
    cosines, sines = cos.squeeze(-2)[None], torch.cat((-sin[..., :half], sin[..., half:]), -1).squeeze(-2)[None]

    def call(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        turned = liger("rope")(q.transpose(1, 2), k.transpose(1, 2), cosines, sines)
        return tuple(x.transpose(1, 2) for x in turned)

    return call


def liger_norms_and_rope(cos: Tensor, sin: Tensor) -> Callable[..., Any]:
    """Return Liger's three kernels for what is one here."""
    turn = liger_rope(cos, sin)

    def call(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor) -> tuple[Tensor, ...]:
        norm = liger("rms_norm", 1e-6)
        return turn(norm(q, q_gain), norm(k, k_gain))

    return call


def liger_linear_logprob(targets: Tensor) -> Callable[..., Any]:
    """Return Liger's GRPO loss from hidden states: the nearest it has to log-probabilities."""

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        rows = hidden[None], weight, targets[None], torch.ones_like(targets)[None]
        advantages = torch.ones(1, device=hidden.device)
        return LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(*rows, advantages)[0]

    return call


def cut_cross_entropy(targets: Tensor, **options: Any) -> Callable[..., Any]:
    """Return Apple's linear cross-entropy."""

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, targets, **options)

    return call


def sdpa(*backends: SDPBackend, mask: Tensor | None = None) -> Callable[..., Any]:
    """Return torch's attention by one of its own back-ends."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(list(backends), set_priority=True):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
            )

    return call


def flex(visible: Callable[..., Tensor], *, compiled: bool) -> Callable[..., Any]:
    """Return torch's FlexAttention, its block mask made for every batch as packed rows need it."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        attend = _compiled_once(flex_attention) if compiled else flex_attention
        make = _compiled_once(create_block_mask) if compiled else create_block_mask
        mask = make(visible, q.size(0), None, q.size(2), k.size(2), device=str(q.device))
        return attend(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))

    return call


_compiled: dict[Any, Any] = {}


def _compiled_once(function: Any) -> Any:
    return _compiled.setdefault(function, partial(torch.compile(function, dynamic=False)))

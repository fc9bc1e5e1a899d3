"""Attention in which a head can attend to nothing: a learned score takes part in every softmax and has no value."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_lm.functional.documents import Documents, band

__all__ = ["sink_attention"]


def sink_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys v_dim"],
    sinks: Float[Tensor, " heads"],
    *,
    mask: Documents | Bool[Tensor, "#batch 1 queries keys"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads queries v_dim"]:
    """Attend from each query to the keys up to its own place, or to nothing. All scores are held, in float32 or better.

    Args:
        query: The last of the keys; ``heads`` is a multiple of ``kv_heads``.
        key: One per column seen so far.
        value: One per key.
        sinks: The score of nothing, for each head.
        mask: As in `lightning_lm.functional.causal_attention`.
        window: Number of keys a query sees, itself included; ``None`` for all.
        scale: Multiplies the scores; ``None`` for ``1 / sqrt(head_dim)``.
        dropout: Probability with which a weight is dropped. Zero outside training.

    Source:
        gpt-oss, arXiv:2508.10925, section 2.2; Xiao et al. 2023, arXiv:2309.17453, section 3.
    """
    if isinstance(mask, Documents):
        mask = mask.mask(window)
    elif mask is None:
        mask = band(query.size(2), key.size(2), window, device=query.device)
    groups = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (query * (query.size(-1) ** -0.5 if scale is None else scale)) @ key.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~mask, -torch.inf)
    nothing = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores, nothing), dim=-1).softmax(dim=-1)[..., :-1]
    return F.dropout(weights, dropout).to(value.dtype) @ value

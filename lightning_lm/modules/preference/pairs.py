"""Base of the objectives on preferences: mask of the pairs that count, and the fraction that the chosen one wins."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.functional.dtypes import accumulation_dtype
from lightning_lm.modules.token_losses import target_mask

__all__ = ["completion_lengths", "counted_pairs", "sum_over_pairs", "wins"]


def completion_lengths(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the number of target tokens of each row, int64 [2 * pairs].

    Args:
        batch: A `types.PairBatch`.
    """
    return target_mask(batch).sum(-1)


def counted_pairs(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mask of the pairs that count, bool [pairs]: both completions have a token; rows of padding have none.

    Args:
        batch: A `types.PairBatch`.
    """
    return (completion_lengths(batch) > 0).view(2, -1).all(0)


def wins(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return 1 where the preferred completion has more, 0 where it has less, and one half for a tie; float32 [pairs].

    Args:
        chosen: Reward of the preferred completion.
        rejected: Reward of the other.
    """
    return ((chosen - rejected).sign().float() + 1) / 2


def sum_over_pairs(losses: Tensor, counted: Tensor) -> TokenLoss:
    """Return the sum of the losses of the pairs that count, and their number in place of that of tokens.

    Args:
        losses: Loss of each pair; if it does not count it may be anything, and gets no gradient.
        counted: Mask of the pairs that count, bool [pairs].
    """
    kept = torch.where(counted, losses, 0)
    return TokenLoss(kept.sum(), kept.detach().sum(dtype=accumulation_dtype(losses.device)), counted.sum())

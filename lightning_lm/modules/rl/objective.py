"""Objective of a policy: the loss of sampled tokens, their weights, and the penalty towards a reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.functional.dtypes import to_accumulate
from lightning_lm.functional.logprobs import TokenScores
from lightning_lm.functional.policy import ClippedSurrogate, KLPenalty, PolicyLoss, PolicyTerms, Reduction, TokenMean
from lightning_lm.modules.token_losses import target_mask
from lightning_lm.parts import Limit, Part

__all__ = ["Objective", "ObjectiveTerms"]


class ObjectiveTerms(NamedTuple):
    """The sums of a micro-batch, and what they were made of."""

    loss: TokenLoss
    """Sums; ``num_tokens`` is the divisor that the reduction asks for, not always tokens."""
    weights: Tensor
    """Weight of each token, float32 [rows, seq - 1]."""
    policy: PolicyTerms
    ratio: Tensor
    """Ratio of each token's probability to that when it was sampled, float32 [rows, seq - 1]."""
    kl: Tensor | None
    """Estimate for each token, float32 [rows, seq - 1], nats."""


@dataclass(frozen=True, kw_only=True)
class Objective(Part, limits={"entropy_coefficient": Limit.FINITE}):
    """The sum over sampled tokens of ``weight * (policy loss + coefficient * KL - coefficient * entropy)``.

    Args:
        loss: Loss of a token.
        reduction: Weight of each token, and the divisor of the sum.
        kl: Penalty on the distance from the policy as it was at the start; ``None`` keeps no copy of it.
        entropy_coefficient: Reward for undecided policies, per nat.
        ratio_to: Denominator of a token's ratio: its probability by the ``policy`` before the updates of
            a rollout, recomputed, or what the ``sampler`` has recorded. The first step's own forward pass gives the
            former; the latter saves a pass over the completions of further steps, and is as good if generation computes
            as training does: the module's own model, in float32.
    """

    loss: PolicyLoss = ClippedSurrogate()
    reduction: Reduction = TokenMean()
    kl: KLPenalty | None = None
    entropy_coefficient: float = 0.0
    ratio_to: Literal["policy", "sampler"] = "policy"

    def __call__(self, scores: TokenScores, batch: Mapping[str, Any]) -> ObjectiveTerms:
        """Return the sums of a micro-batch.

        Args:
            scores: Scores of the current policy.
            batch: A `types.ExperienceBatch`. Without ``old_logprobs`` the present policy is the one that sampled.
        """
        mask = target_mask(batch)
        logprobs = scores.logprobs
        old = batch.get("old_logprobs", logprobs.detach())
        advantages = batch["advantages"]
        advantages = advantages if advantages.dim() == 2 else advantages[:, None].expand_as(logprobs)
        policy = self.loss(logprobs, old, advantages, mask)
        losses, kl = policy.loss, None
        if batch.get("importance_weights") is not None:
            losses = losses * batch["importance_weights"]
        if self.kl is not None:
            kl = self.kl(logprobs, batch["reference_logprobs"], old)
            losses = losses + self.kl.coefficient * kl
        if self.entropy_coefficient:
            losses = losses - self.entropy_coefficient * scores.entropies
        weights = self.reduction.weights(mask)
        loss_sum = torch.where(mask, weights * losses, 0).sum()
        count = self.reduction.count(mask, batch["tokens_per_row"])
        ratio = (logprobs.detach() - old).exp()
        return ObjectiveTerms(TokenLoss(loss_sum, to_accumulate(loss_sum.detach()), count), weights, policy, ratio, kl)

"""Policy-gradient losses on sampled tokens, their reductions over a window of the optimizer, and the KL penalty.

Three values make an objective: a `PolicyLoss` gives one loss per token, a `Reduction` says what each token weighs, and
a `KLPenalty` holds the policy near a reference. Weighted token losses are summed, so that micro-batches of one window
and ranks add up to the same gradient however the window is cut.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from lightning_lm.functional.logprobs import masked_mean
from lightning_lm.functional.shapes import require_shape
from lightning_lm.parts import Limit, Part

__all__ = [
    "CISPO",
    "GSPO",
    "ClippedSurrogate",
    "ConstantLength",
    "KLPenalty",
    "PolicyGradient",
    "PolicyLoss",
    "PolicyTerms",
    "Reduction",
    "RolloutTokenMean",
    "SequenceMean",
    "TokenMean",
    "clipped_value_loss",
    "kl_estimate",
]

_MAX_LOGRATIO = 20.0
"""A log-ratio is held within this before `exp`, so that a token of probability 0 gives no infinity."""


class PolicyTerms(NamedTuple):
    """The loss of each token, and where its ratio was clipped."""

    loss: Float[Tensor, "rows seq"]
    clipped_low: Bool[Tensor, "rows seq"]
    clipped_high: Bool[Tensor, "rows seq"]


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(Part):
    """Base of the losses per token. ``advantages`` is [rows, seq]; log-probabilities are in nats."""

    @abstractmethod
    def __call__(
        self,
        logprobs: Float[Tensor, "rows seq"],
        old_logprobs: Float[Tensor, "rows seq"],
        advantages: Float[Tensor, "rows seq"],
        mask: Bool[Tensor, "rows seq"],
    ) -> PolicyTerms:
        """Return the loss of each token; masked tokens may hold anything finite."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(PolicyLoss):
    """``-A log pi``: the plain policy gradient, right for samples of the present policy only.

    With advantages from a baseline it is REINFORCE with baseline, with raw rewards the naive form.

    Source:
        Williams 1992, "Simple statistical gradient-following algorithms".
    """

    @override
    def __call__(
        self,
        logprobs: Float[Tensor, "rows seq"],
        old_logprobs: Float[Tensor, "rows seq"],
        advantages: Float[Tensor, "rows seq"],
        mask: Bool[Tensor, "rows seq"],
    ) -> PolicyTerms:
        require_shape("rows seq", logprobs=logprobs, advantages=advantages, mask=mask)
        never = torch.zeros_like(mask)
        return PolicyTerms(-advantages * logprobs, never, never)


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate(
    PolicyLoss,
    limits={"clip_low": Limit.NON_NEGATIVE, "clip_high": Limit.NON_NEGATIVE, "dual_clip": Limit.POSITIVE},
):
    """``-min(r A, clip(r, 1 - low, 1 + high) A)`` with ``r = pi / pi_old`` for each token.

    Args:
        clip_low: Largest decrease of the ratio below 1. Unitless.
        clip_high: Largest increase of the ratio; larger than ``clip_low`` keeps rare tokens alive (DAPO).
        dual_clip: If given, above 1: the loss of a bad token is held at ``-dual_clip * A``, however likely it became.

    Source:
        Schulman et al. 2017, arXiv:1707.06347, equation 7; Yu et al. 2025 (DAPO), arXiv:2503.14476, equation 10;
        Ye et al. 2020 (dual clip), arXiv:1912.09729, equation 5.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None

    @override
    def __call__(
        self,
        logprobs: Float[Tensor, "rows seq"],
        old_logprobs: Float[Tensor, "rows seq"],
        advantages: Float[Tensor, "rows seq"],
        mask: Bool[Tensor, "rows seq"],
    ) -> PolicyTerms:
        require_shape("rows seq", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
        return _clip(_ratio(logprobs - old_logprobs), advantages, self)


@dataclass(frozen=True, kw_only=True)
class GSPO(ClippedSurrogate):
    """The clipped surrogate with one ratio a sequence: the geometric mean of its tokens' ratios.

    Source:
        Zheng et al. 2025, arXiv:2507.18071, equations 5 and 7.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    @override
    def __call__(
        self,
        logprobs: Float[Tensor, "rows seq"],
        old_logprobs: Float[Tensor, "rows seq"],
        advantages: Float[Tensor, "rows seq"],
        mask: Bool[Tensor, "rows seq"],
    ) -> PolicyTerms:
        require_shape("rows seq", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
        logratio = masked_mean(logprobs - old_logprobs, mask, dim=-1)
        return _clip(_ratio(logratio)[:, None].expand_as(logprobs), advantages, self)


@dataclass(frozen=True, kw_only=True)
class CISPO(PolicyLoss, limits={"clip_low": Limit.NON_NEGATIVE, "clip_high": Limit.NON_NEGATIVE}):
    """``-sg(clip(r)) A log pi``: clips the weight of a token, but never takes its gradient away.

    Args:
        clip_low: Largest decrease of the weight below 1; ``None`` for no limit.
        clip_high: Largest increase of the weight above 1.

    Source:
        MiniMax 2025, arXiv:2506.13585, equations 4 and 5.
    """

    clip_low: float | None = None
    clip_high: float = 4.0

    @override
    def __call__(
        self,
        logprobs: Float[Tensor, "rows seq"],
        old_logprobs: Float[Tensor, "rows seq"],
        advantages: Float[Tensor, "rows seq"],
        mask: Bool[Tensor, "rows seq"],
    ) -> PolicyTerms:
        require_shape("rows seq", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
        ratio = _ratio(logprobs.detach() - old_logprobs)
        low = 0.0 if self.clip_low is None else 1 - self.clip_low
        weight = ratio.clamp(low, 1 + self.clip_high)
        return PolicyTerms(-weight * advantages * logprobs, ratio < low, ratio > 1 + self.clip_high)


def _ratio(logratio: Tensor) -> Tensor:
    return logratio.clamp(-_MAX_LOGRATIO, _MAX_LOGRATIO).exp()


def _clip(ratio: Tensor, advantages: Tensor, bounds: ClippedSurrogate) -> PolicyTerms:
    low, high = 1 - bounds.clip_low, 1 + bounds.clip_high
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if bounds.dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -bounds.dual_clip * advantages), loss)
    return PolicyTerms(loss, (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0))


@dataclass(frozen=True, kw_only=True)
class Reduction(Part):
    """Base of the reductions: how the losses of tokens become the loss of an optimizer step.

    The step's loss is the sum of ``weights * loss`` over the sum of ``count``, each over all ranks and micro-batches of
    the step. Nothing else is divided, so a window may be cut anywhere.
    """

    @abstractmethod
    def weights(self, mask: Bool[Tensor, "rows seq"]) -> Float[Tensor, "rows seq"]:
        """Return what each token weighs, 0 where masked."""

    @abstractmethod
    def count(self, mask: Bool[Tensor, "rows seq"], tokens_per_row: float | Tensor) -> Float[Tensor, ""]:
        """Return what these rows add to the divisor.

        Args:
            mask: The policy's own tokens.
            tokens_per_row: Mean number of unmasked tokens of a row, over the whole rollout and all ranks.
        """


@dataclass(frozen=True, kw_only=True)
class TokenMean(Reduction):
    """Every token of the optimizer step weighs the same (token-mean, called BNPO where the batch is the step)."""

    @override
    def weights(self, mask: Bool[Tensor, "rows seq"]) -> Float[Tensor, "rows seq"]:
        return mask.float()

    @override
    def count(self, mask: Bool[Tensor, "rows seq"], tokens_per_row: float | Tensor) -> Float[Tensor, ""]:
        return mask.sum().float()


@dataclass(frozen=True, kw_only=True)
class RolloutTokenMean(Reduction):
    """Every token of the whole rollout weighs the same, also between the steps that it is cut into (DAPO).

    Source:
        Yu et al. 2025, arXiv:2503.14476, section 3.3.
    """

    @override
    def weights(self, mask: Bool[Tensor, "rows seq"]) -> Float[Tensor, "rows seq"]:
        return mask.float()

    @override
    def count(self, mask: Bool[Tensor, "rows seq"], tokens_per_row: float | Tensor) -> Float[Tensor, ""]:
        return torch.as_tensor(len(mask) * tokens_per_row, dtype=torch.float32, device=mask.device)


@dataclass(frozen=True, kw_only=True)
class SequenceMean(Reduction):
    """Mean over tokens, then over completions: a token of a long completion counts less (GRPO).

    Source:
        Shao et al. 2024, arXiv:2402.03300, equation 3.
    """

    @override
    def weights(self, mask: Bool[Tensor, "rows seq"]) -> Float[Tensor, "rows seq"]:
        return mask.float() / mask.sum(-1, keepdim=True).clamp(min=1)

    @override
    def count(self, mask: Bool[Tensor, "rows seq"], tokens_per_row: float | Tensor) -> Float[Tensor, ""]:
        return mask.any(-1).sum().float()


@dataclass(frozen=True, kw_only=True)
class ConstantLength(Reduction, limits={"max_tokens": Limit.COUNT}):
    """Sum of a completion's tokens over a constant, mean over completions: no length bias (Dr. GRPO).

    Args:
        max_tokens: The constant, commonly the longest completion allowed. Tokens.

    Source:
        Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """

    max_tokens: int = field(kw_only=False)

    @override
    def weights(self, mask: Bool[Tensor, "rows seq"]) -> Float[Tensor, "rows seq"]:
        return mask.float() / self.max_tokens

    @override
    def count(self, mask: Bool[Tensor, "rows seq"], tokens_per_row: float | Tensor) -> Float[Tensor, ""]:
        return mask.any(-1).sum().float()


@dataclass(frozen=True, kw_only=True)
class KLPenalty(Part, limits={"coefficient": Limit.NON_NEGATIVE}):
    """A penalty on the divergence of the policy from a reference, ``KL(pi || pi_ref)``.

    Args:
        coefficient: Weight of the penalty against the policy loss. Unitless.
        estimator: Estimator of the value from samples; see `kl_estimate`.
        unbiased: Use the gradient of the reverse KL. Differentiating the ``k3`` estimate itself gives the gradient of
            the forward KL, that of ``k1`` nothing at all on average.
    """

    coefficient: float = 0.04
    estimator: Literal["k1", "k2", "k3"] = "k3"
    unbiased: bool = True

    def __call__(
        self,
        logprobs: Float[Tensor, "rows seq"],
        reference_logprobs: Float[Tensor, "rows seq"],
        old_logprobs: Float[Tensor, "rows seq"],
    ) -> Float[Tensor, "rows seq"]:
        """Return the estimate of each token, in nats, not yet times the coefficient.

        ``old_logprobs`` are those of the policy that sampled the tokens: their ratio corrects the gradient.
        """
        value = kl_estimate(logprobs, reference_logprobs, self.estimator)
        if not self.unbiased:
            return value
        # grad E_pi[log pi/pi_ref] = E_old[ratio * log(pi/pi_ref) * grad log pi], which is ratio times the slope of k2.
        ratio = _ratio(logprobs.detach() - old_logprobs)
        slope = ratio * kl_estimate(logprobs, reference_logprobs, "k2")
        return value.detach() + slope - slope.detach()


def kl_estimate(
    logprobs: Float[Tensor, "*tokens"],
    reference_logprobs: Float[Tensor, "*tokens"],
    estimator: Literal["k1", "k2", "k3"] = "k3",
) -> Float[Tensor, "*tokens"]:
    """Estimate ``KL(pi || pi_ref)`` from tokens that ``pi`` has sampled, in nats.

    With ``d = log pi - log pi_ref``: ``k1 = d`` (unbiased, of either sign), ``k2 = d^2 / 2`` (biased, small variance),
    ``k3 = exp(-d) - 1 + d`` (unbiased, never negative).

    Args:
        logprobs: Log-probabilities of the sampled tokens under ``pi``. Nats.
        reference_logprobs: Log-probabilities of the same tokens under ``pi_ref``. Nats.
        estimator: One of the three estimators.

    Source:
        Schulman 2020, "Approximating KL divergence".
    """
    require_shape("", logprobs=logprobs, reference_logprobs=reference_logprobs)
    difference = logprobs - reference_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return torch.expm1(-difference.clamp(-_MAX_LOGRATIO, _MAX_LOGRATIO)) + difference


def clipped_value_loss(
    values: Float[Tensor, "rows seq"],
    old_values: Float[Tensor, "rows seq"],
    returns: Float[Tensor, "rows seq"],
    *,
    clip: float | None = 0.2,
) -> Float[Tensor, "rows seq"]:
    """Return half the squared error of each value, or of the value held near its old one where that is larger.

    Args:
        values: The critic's present estimates.
        old_values: Its estimates when the completions were sampled.
        returns: Target values.
        clip: Largest change of a value in one rollout, in units of reward; ``None`` for no limit.

    Source:
        Schulman et al., PPO's reference implementation (the paper has no value clipping).
    """
    require_shape("rows seq", values=values, old_values=old_values, returns=returns)
    errors = (values - returns).square()
    if clip is not None:
        held = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (held - returns).square())
    return 0.5 * errors

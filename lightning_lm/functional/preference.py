"""Preference losses: the DPO family and the Bradley-Terry reward loss on pairs, KTO on single completions.

With ``log-ratio = log pi(y) - log pi_ref(y)``, summed over the tokens of a completion ``y``, every loss here is a value
that maps the log-ratios of a pair to one number per pair. All of them are even-handed at the start: where the policy
equals its reference the sigmoid loss is ln 2, whatever the pair.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.shapes import require_shape
from lightning_lm.parts import Limit, Part

__all__ = [
    "IPO",
    "KTO",
    "NCA",
    "APODown",
    "APOZero",
    "ChosenNLL",
    "Hinge",
    "PairLogProbs",
    "PreferenceLoss",
    "Robust",
    "Sigmoid",
    "SimPO",
    "WeightedLosses",
    "bradley_terry_loss",
]


class PairLogProbs(NamedTuple):
    """Log-probabilities of the completions of each pair, in nats, summed over the completion's tokens."""

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]
    reference_chosen: Float[Tensor, " pairs"]
    reference_rejected: Float[Tensor, " pairs"]
    chosen_lengths: Float[Tensor, " pairs"]
    """Tokens of the preferred completion, at least 1."""
    rejected_lengths: Float[Tensor, " pairs"]

    @property
    def chosen_logratio(self) -> Float[Tensor, " pairs"]:
        """Log-ratio of the preferred completion between policy and reference, in nats."""
        require_shape("pairs", **self._asdict())
        return self.chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> Float[Tensor, " pairs"]:
        """Log-ratio of the rejected completion between policy and reference, in nats."""
        return self.rejected - self.reference_rejected

    @property
    def margin(self) -> Float[Tensor, " pairs"]:
        """Difference of the two log-ratios, in nats: what DPO raises."""
        return self.chosen_logratio - self.rejected_logratio

    @property
    def margin_per_token(self) -> Float[Tensor, " pairs"]:
        """Difference of the two log-ratios, each divided by its completion's length, in nats."""
        return self.chosen_logratio / self.chosen_lengths - self.rejected_logratio / self.rejected_lengths

    @property
    def per_token(self) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Log-probabilities of both completions, each divided by its length, in nats."""
        require_shape("pairs", **self._asdict())
        return self.chosen / self.chosen_lengths, self.rejected / self.rejected_lengths


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(Part):
    """Base of the losses on pairs. Call it with `PairLogProbs`; it returns one loss per pair."""

    needs_reference = True

    @abstractmethod
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, " pairs"]:
        """Return the loss of each pair."""

    def rewards(self, pairs: PairLogProbs) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Return the implicit rewards of both completions, ``beta * log-ratio``: for the log. Unitless.

        Args:
            pairs: Log-probabilities of the pairs.
        """
        beta = float(getattr(self, "beta", 1.0))
        return beta * pairs.chosen_logratio, beta * pairs.rejected_logratio


@dataclass(frozen=True, kw_only=True)
class Sigmoid(PreferenceLoss, limits={"beta": Limit.POSITIVE, "label_smoothing": Limit.FRACTION}):
    """DPO, with the label smoothing of conservative DPO.

    ``-(1 - s) log sigmoid(beta * margin) - s log sigmoid(-beta * margin)``

    Args:
        beta: Strength of the pull to the reference. Unitless.
        label_smoothing: Probability ``s`` that a pair is labelled the wrong way round.
        length_normalize: Use log-ratios per token instead of per completion.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, equation 7; Mitchell 2023, "A note on DPO with noisy preferences".
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalize: bool = False

    @override
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, " pairs"]:
        margin = pairs.margin_per_token if self.length_normalize else pairs.margin
        right, wrong = F.logsigmoid(self.beta * margin), F.logsigmoid(-self.beta * margin)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong


@dataclass(frozen=True, kw_only=True)
class Robust(PreferenceLoss, limits={"beta": Limit.POSITIVE}):
    """DPO that is unbiased when a known fraction of the pairs is labelled the wrong way round.

    Args:
        beta: Strength of the pull to the reference. Unitless.
        flip_rate: Fraction of wrong labels, below one half.

    Source:
        Chowdhury et al. 2024, arXiv:2403.00409, equation 11.
    """

    beta: float = 0.1
    flip_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.flip_rate < 0.5:
            raise ConfigurationError(f"flip_rate={self.flip_rate} must be at least 0 and below 0.5.")

    @override
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, " pairs"]:
        right, wrong = F.logsigmoid(self.beta * pairs.margin), F.logsigmoid(-self.beta * pairs.margin)
        return (self.flip_rate * wrong - (1 - self.flip_rate) * right) / (1 - 2 * self.flip_rate)


@dataclass(frozen=True, kw_only=True)
class IPO(PreferenceLoss, limits={"beta": Limit.POSITIVE}):
    """Squared distance of the margin from ``1 / (2 beta)``, so that a certain preference does not push for ever.

    The log-ratios are means over tokens, as its authors have corrected it; sums would tie the target to the length.

    Args:
        beta: Strength of the pull to the reference. Unitless.

    Source:
        Azar et al. 2023, arXiv:2310.12036, equation 17.
    """

    beta: float = 0.1

    @override
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, " pairs"]:
        return (pairs.margin_per_token - 1 / (2 * self.beta)).square()


@dataclass(frozen=True, kw_only=True)
class Hinge(PreferenceLoss, limits={"beta": Limit.POSITIVE}):
    """``max(0, 1 - beta * margin)``: the gradient vanishes once the margin is large enough.

    Args:
        beta: Strength of the pull to the reference. Unitless.

    Source:
        Zhao et al. 2023 (SLiC), arXiv:2305.10425; Liu et al. 2023 (RSO), arXiv:2309.06657, section 3.2.
    """

    beta: float = 0.1

    @override
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, " pairs"]:
        return F.relu(1 - self.beta * pairs.margin)


@dataclass(frozen=True, kw_only=True)
class NCA(PreferenceLoss, limits={"beta": Limit.POSITIVE}):
    """Noise-contrastive alignment of pairs: raises the preferred completion's own likelihood, not only the margin.

    Args:
        beta: Strength of the pull to the reference. Unitless.

    Source:
        Chen et al. 2024, arXiv:2402.05369, table 1 (two completions).
    """

    beta: float = 0.1

    @override
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, " pairs"]:
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@dataclass(frozen=True, kw_only=True)
class APOZero(PreferenceLoss, limits={"beta": Limit.POSITIVE}):
    """Anchored preference: raises the chosen completion, lowers the rejected one. For data better than the policy.

    Args:
        beta: Strength of the pull to the reference. Unitless.

    Source:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, section 4.
    """

    beta: float = 0.1

    @override
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, " pairs"]:
        chosen, rejected = self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio
        return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


@dataclass(frozen=True, kw_only=True)
class APODown(PreferenceLoss, limits={"beta": Limit.POSITIVE}):
    """Anchored preference: lowers both completions, the rejected one more. For data worse than the policy.

    Args:
        beta: Strength of the pull to the reference. Unitless.

    Source:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, section 4.
    """

    beta: float = 0.1

    @override
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, " pairs"]:
        chosen, margin = self.beta * pairs.chosen_logratio, self.beta * pairs.margin
        return torch.sigmoid(chosen) + 1 - torch.sigmoid(margin)


@dataclass(frozen=True, kw_only=True)
class SimPO(PreferenceLoss, limits={"beta": Limit.POSITIVE, "target_margin": Limit.FINITE}):
    """Log-probability per token as the reward, without a reference model, and a target margin.

    Args:
        beta: Scale of the reward. Unitless.
        target_margin: Target difference of the rewards.

    Source:
        Meng et al. 2024, arXiv:2405.14734, equation 6.
    """

    beta: float = 2.0
    target_margin: float = 1.0

    needs_reference = False

    @override
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, " pairs"]:
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(chosen - rejected - self.target_margin)

    @override
    def rewards(self, pairs: PairLogProbs) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Return ``beta`` times the log-probability per token of both completions."""
        chosen, rejected = pairs.per_token
        return self.beta * chosen, self.beta * rejected


@dataclass(frozen=True, kw_only=True)
class ChosenNLL(PreferenceLoss):
    """Negative log-likelihood per token of the preferred completion: keeps it likely while the margin grows.

    Source:
        Pang et al. 2024, arXiv:2404.19733, equation 1 (its NLL term).
    """

    needs_reference = False

    @override
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, " pairs"]:
        return -pairs.per_token[0]


@dataclass(frozen=True, kw_only=True)
class WeightedLosses(PreferenceLoss, limits={"weights": Limit.FINITE}):
    """A weighted sum of losses, for example DPO with a fraction of `ChosenNLL`.

    Args:
        losses: Losses to add up.
        weights: One factor per loss. Unitless.

    Source:
        Wang et al. 2024 (MPO), arXiv:2411.10442, section 3.1.
    """

    losses: tuple[PreferenceLoss, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.losses) != len(self.weights) or not self.losses:
            raise ConfigurationError(f"{len(self.losses)} losses need as many weights, got {len(self.weights)}.")

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """True if any of the losses compares with a reference model."""
        return any(loss.needs_reference for loss in self.losses)

    @override
    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, " pairs"]:
        weighted = [weight * loss(pairs) for loss, weight in zip(self.losses, self.weights, strict=True)]
        return torch.stack(weighted).sum(0)

    @override
    def rewards(self, pairs: PairLogProbs) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Return the implicit rewards as the first loss sees them."""
        return self.losses[0].rewards(pairs)


def bradley_terry_loss(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    *,
    margin: Float[Tensor, " pairs"] | float = 0.0,
    center_coefficient: float = 0.0,
) -> Float[Tensor, " pairs"]:
    """Return the loss of a reward model on each pair.

    ``-log sigmoid(chosen - rejected - margin) + c (chosen + rejected)^2``. The first term does not see a shift of all
    rewards; the second holds their mean near zero.

    Args:
        chosen: Reward of the preferred completion.
        rejected: Reward of the other.
        margin: Margin of the preferred completion, in units of reward.
        center_coefficient: The factor ``c``.

    Source:
        Ouyang et al. 2022, arXiv:2203.02155, equation 1; Touvron et al. 2023, arXiv:2307.09288, equation 2 (margin);
        Eisenstein et al. 2023, arXiv:2312.09244, section 2 (centring).
    """
    margins = {"margin": margin} if isinstance(margin, Tensor) and margin.dim() else {}
    require_shape("pairs", chosen=chosen, rejected=rejected, **margins)
    return -F.logsigmoid(chosen - rejected - margin) + center_coefficient * (chosen + rejected).square()


@dataclass(frozen=True, kw_only=True)
class KTO(Part, limits=dict.fromkeys(("beta", "desirable_weight", "undesirable_weight"), Limit.POSITIVE)):
    """Kahneman-Tversky optimization: a loss on single completions, each desirable or not, without pairs.

    With the log-ratio ``r`` of a completion and the KL estimate ``z`` of its batch, the loss of a desirable completion
    is ``w_d (1 - sigmoid(beta (r - z)))`` and that of another ``w_u (1 - sigmoid(beta (z - r)))``.

    Args:
        beta: Strength of the pull to the reference. Unitless.
        desirable_weight: Factor on desirable completions. Unitless.
        undesirable_weight: Factor on the others. The paper advises weights for which the products of weight and number
            of both kinds are between 1:1 and 4:3.

    Raises:
        ConfigurationError: If ``beta`` or a weight is not positive.

    Source:
        Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __call__(
        self, logratios: Float[Tensor, " rows"], desirable: Bool[Tensor, " rows"], kl: Float[Tensor, ""]
    ) -> Float[Tensor, " rows"]:
        """Return the loss of each completion.

        Args:
            logratios: ``log pi(completion) - log pi_ref(completion)``, in nats.
            desirable: Mask of the desirable completions.
            kl: Estimate of the divergence from the reference, nats; no gradient flows through it.
        """
        require_shape("rows", logratios=logratios, desirable=desirable)
        margins = self.beta * (logratios - kl.detach())
        gains = torch.sigmoid(torch.where(desirable, margins, -margins))
        return torch.where(desirable, self.desirable_weight, self.undesirable_weight) * (1 - gains)

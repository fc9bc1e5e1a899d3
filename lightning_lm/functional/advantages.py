"""Advantages: how much better a completion, or a token of it, was than expected.

Rewards come as one row per prompt and one column per sampled completion. A group of equal rewards gets zeros, decided
by equality: the standard deviation of eight times 0.7 is not zero in float32 but 6e-8, and dividing by it would turn
rounding noise into a gradient.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.shapes import require_shape
from lightning_lm.parts import Limit, Part

__all__ = [
    "Advantage",
    "GroupAdvantage",
    "MaxRLAdvantage",
    "RewardFilter",
    "explained_variance",
    "gae",
    "group_advantages",
    "whiten",
]

Baseline = Literal["group", "leave_one_out", "batch", "none"]
Scale = Literal["group", "batch", "mean", "none"]


@dataclass(frozen=True, kw_only=True)
class Advantage(Part):
    """Base of the ways in which rewards become advantages; call it with rewards [prompts, samples], NaN if missing."""

    @abstractmethod
    def __call__(self, rewards: Float[Tensor, "prompts samples"]) -> Float[Tensor, "prompts samples"]:
        """Return the advantage of each completion; NaN if it is not trained on."""


@dataclass(frozen=True, kw_only=True)
class GroupAdvantage(Advantage, limits={"eps": Limit.NON_NEGATIVE}):
    """Advantage of a completion over others of its prompt, in units of reward or of their standard deviation.

    Args:
        baseline: Value to subtract: the mean of the prompt's completions (``group``), of the prompt's other completions
            (``leave_one_out``), of all completions (``batch``), or nothing.
        scale: Divisor: the standard deviation of the prompt's completions (``group``) or of all completions
            (``batch``), the mean reward of the prompt's completions (``mean``; see `MaxRLAdvantage`), or none.
        eps: Added to the divisor, in units of reward.

    Source:
        Shao et al. 2024 (GRPO), arXiv:2402.03300, section 4.1.2; Ahmadian et al. 2024 (leave one out),
        arXiv:2402.14740; Liu et al. 2025 (no scale: Dr. GRPO), arXiv:2503.20783.
    """

    baseline: Baseline = "group"
    scale: Scale = "group"
    eps: float = 1e-4

    @override
    def __call__(self, rewards: Float[Tensor, "prompts samples"]) -> Float[Tensor, "prompts samples"]:
        """Return the advantage of each completion."""
        return group_advantages(rewards, baseline=self.baseline, scale=self.scale, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class MaxRLAdvantage(Advantage, limits={"eps": Limit.NON_NEGATIVE}):
    """Distance from the group's mean reward, divided by that mean: a rare success weighs more than a frequent one.

    For rewards of 0 and 1 the gradient follows the log of the success rate instead of the rate itself.

    Args:
        eps: Added to the mean, in units of reward.

    Source:
        Tajwar et al. 2026, arXiv:2602.02710.
    """

    eps: float = 1e-6

    @override
    def __call__(self, rewards: Float[Tensor, "prompts samples"]) -> Float[Tensor, "prompts samples"]:
        """Return the advantage of each completion, 0 if its reward is missing."""
        return group_advantages(rewards, scale="mean", eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class RewardFilter(Advantage, limits={"threshold": Limit.FINITE}):
    """1 for every completion whose reward reaches the threshold; the others are not trained on.

    With `PolicyGradient` the loss is their negative log-likelihood: expert iteration, which samples, filters and
    fine-tunes on what is left.

    Args:
        threshold: Least reward of a completion that is trained on.

    Source:
        Anthony et al. 2017, arXiv:1705.08439; Zelikman et al. 2022 (STaR), arXiv:2203.14465, section 3.1; Singh et al.
        2024 (ReST-EM), arXiv:2312.06585, section 3.
    """

    threshold: float = 1.0

    @override
    def __call__(self, rewards: Float[Tensor, "prompts samples"]) -> Float[Tensor, "prompts samples"]:
        """Return 1 or NaN for each completion."""
        return torch.ones_like(rewards).masked_fill(~(rewards >= self.threshold), torch.nan)


def group_advantages(
    rewards: Float[Tensor, "prompts samples"],
    *,
    baseline: Baseline = "group",
    scale: Scale = "group",
    eps: float = 1e-4,
) -> Float[Tensor, "prompts samples"]:
    """Subtract a baseline from each reward and scale the difference.

    A missing reward (NaN) counts in no mean and no standard deviation, and its own advantage is 0.

    Args:
        rewards: One row per prompt, one column per completion, NaN if missing. Unitless.
        baseline: Value to subtract; see `GroupAdvantage`.
        scale: Value to divide by; see `GroupAdvantage`.
        eps: Added to the divisor, in units of reward.

    Raises:
        ConfigurationError: If rewards are not [prompts, samples], a baseline or scale of the group is asked for and
            there is one sample per prompt, or a reward below 0 is to be divided by the mean.
    """
    if rewards.dim() != 2:
        raise ConfigurationError(
            f"rewards has shape {tuple(rewards.shape)}, and advantages need [prompts, samples]: "
            "rewards.view(-1, samples) if the samples of a prompt follow each other."
        )
    samples = rewards.shape[1]
    if samples < 2 and (baseline in ("group", "leave_one_out") or scale in ("group", "mean")):
        raise ConfigurationError(
            f"A group has {samples} sample per prompt; its baseline needs at least 2. Raise the number of samples, or "
            "use baseline='batch' with scale='batch' or 'none'."
        )
    rewards = rewards.float()
    if scale == "mean" and bool((rewards < 0).any()):
        raise ConfigurationError(
            f"A reward of {rewards.nan_to_num(nan=0.0).min().item():g} is below 0, and scale='mean' divides by the "
            "group's mean, which must not be negative. Use scale='group', or rewards of 0 and more."
        )
    centred = rewards - _BASELINES[baseline](rewards)
    if baseline in ("group", "leave_one_out"):
        centred = centred.masked_fill(_is_constant(rewards), 0.0)
    elif baseline == "batch" and bool(_is_constant(rewards.view(1, -1))):
        centred = torch.zeros_like(centred)
    advantages = centred / (_SCALES[scale](rewards) + eps) if scale != "none" else centred
    return advantages.masked_fill(rewards.isnan(), 0.0)


def _is_constant(rewards: Tensor) -> Tensor:
    low, high = rewards.nan_to_num(nan=torch.inf).amin(1), rewards.nan_to_num(nan=-torch.inf).amax(1)
    return (low >= high)[:, None]


def _leave_one_out(rewards: Tensor) -> Tensor:
    others = (~rewards.isnan()).sum(1, keepdim=True) - 1
    return (rewards.nansum(1, keepdim=True) - rewards) / others.clamp(min=1)


def _std(rewards: Tensor) -> Tensor:
    """Standard deviation of the known rewards of each row, with Bessel's correction; 0 for fewer than two."""
    squares = (rewards - rewards.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    return (squares / ((~rewards.isnan()).sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()


_BASELINES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": lambda rewards: rewards.nanmean(1, keepdim=True),
    "leave_one_out": _leave_one_out,
    "batch": lambda rewards: rewards.nanmean(),
    "none": torch.zeros_like,
}
_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": _std,
    "batch": lambda rewards: _std(rewards.view(1, -1)),
    "mean": lambda rewards: rewards.nanmean(1, keepdim=True),
}


def gae(
    rewards: Float[Tensor, "rows seq"],
    values: Float[Tensor, "rows seq"],
    mask: Bool[Tensor, "rows seq"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "rows seq"], Float[Tensor, "rows seq"]]:
    """Return generalised advantage estimates and the returns that a critic learns.

    ``A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l})``. The value after a completion's last token is 0.
    Masked tokens (padding, a tool's output) are stepped over: the estimate passes from the token before to the token
    after them, undiscounted.

    Args:
        rewards: Reward of each token.
        values: The critic's estimate before each token, without gradient.
        mask: The policy's own tokens.
        gamma: Discount a token.
        lam: 0 trusts the critic, 1 the rewards.

    Returns:
        Advantages and returns (advantage + value), 0 where masked.

    Source:
        Schulman et al. 2016, arXiv:1506.02438, equation 16.
    """
    require_shape("rows seq", rewards=rewards, values=values, mask=mask)
    following = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(following)
    columns = []
    for t in range(values.shape[1] - 1, -1, -1):
        keep = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = torch.where(keep, delta + gamma * lam * advantage, advantage)
        following = torch.where(keep, values[:, t], following)
        columns.append(torch.where(keep, advantage, 0.0))
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def whiten(
    values: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    shift_mean: bool = True,
    all_reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    eps: float = 1e-8,
) -> Float[Tensor, "*shape"]:
    """Scale unmasked values to variance 1 and, unless told otherwise, mean 0; masked ones become 0.

    Args:
        values: Values to whiten.
        mask: Mask of the values that count.
        shift_mean: Subtract the mean; otherwise it stays as it was.
        all_reduce: Sums a float64 [3] over ranks (count, sum, sum of squares about a common origin); the default is
            one process.
        eps: Added to the variance.
    """
    require_shape("", values=values, mask=mask)
    kept = values.double().masked_fill(~mask, 0.0)
    count, total, _ = all_reduce(torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])).unbind()
    mean = total / count.clamp(min=1)
    deviation = (values.double() - mean).masked_fill(~mask, 0.0)
    # A second pass about the mean: the difference of two large sums would lose the variance of nearly equal values.
    squares = all_reduce(torch.stack([torch.zeros_like(total), torch.zeros_like(total), deviation.square().sum()]))[2]
    variance = squares / (count - 1).clamp(min=1)
    scaled = deviation * torch.rsqrt(variance + eps)
    return (scaled if shift_mean else scaled + mean).masked_fill(~mask, 0.0).to(values.dtype)


def explained_variance(
    values: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Return the fraction of the returns' variance that the critic explains: 1 is perfect, 0 a constant, below 0 worse.

    Returns of no variance give 0.

    Args:
        values: The critic's estimates.
        returns: Returns to be predicted.
        mask: The policy's own tokens.
    """
    require_shape("", values=values, returns=returns, mask=mask)
    kept_values, kept_returns = values[mask].double(), returns[mask].double()
    if kept_returns.numel() < 2:
        return torch.zeros((), dtype=torch.float32, device=values.device)
    variance = kept_returns.var()
    explained = 1 - (kept_returns - kept_values).var() / variance
    return torch.where(variance > 0, explained, torch.zeros_like(explained)).float()

"""Metrics of rollouts and of policy objectives, under the names of TRL."""

import numpy as np
import torch
from torch import Tensor

from lightning_lm.distributed import Ranks
from lightning_lm.functional.logprobs import TokenScores
from lightning_lm.modules.metrics import MeasuredModule
from lightning_lm.modules.rl.objective import ObjectiveTerms
from lightning_lm.modules.rl.rollout import Rollout, Validation

__all__ = [
    "record_objective",
    "record_rewards",
    "record_rollout",
    "record_sampler",
    "record_validation",
]


def record_rollout(module: MeasuredModule, rollout: Rollout, seconds: float) -> None:
    """Record rewards, lengths and duration of a rollout, and its success for a curriculum. Collective.

    Args:
        module: Keeps the metrics.
        rollout: The completions.
        seconds: Time it took, with everything that was computed from it.
    """
    record_rewards(module, rollout)
    groups = rollout.groups
    rewarded = ~np.isnan(groups).any(1)
    module.record("reward_std", groups[rewarded].std(1, ddof=min(1, rollout.samples - 1)).sum(), rewarded.sum())
    module.record("frac_reward_zero_std", len(rollout.zero_variance_groups), len(groups))
    lengths = _record_lengths(module, rollout)
    prompt_tokens = sum(len(answer.prompt_ids) for answer in rollout.completions)
    module.record_total("num_tokens", float(lengths.sum() + prompt_tokens))
    module.record("rollout/seconds", seconds)
    module.record("rollout/tokens_per_s", lengths.sum(), seconds)
    module.record("rollout/resampled_groups", rollout.resampled)
    module.record("rollout/sampler_staleness", rollout.sampler_age)
    _record_success(module, rollout)


def _record_success(module: MeasuredModule, rollout: Rollout) -> None:
    """Tell the curriculum of the datamodule, if it has one, how many completions were right."""
    curriculum = getattr(module.trainer.datamodule, "curriculum", None)  # type: ignore[attr-defined]
    if curriculum is None:
        return
    module.record("curriculum/level", curriculum.state.level)
    module.record("curriculum/success", rollout.num_right, rollout.num_scored)
    counts = torch.tensor([rollout.num_right, rollout.num_scored], device=module.device)
    curriculum.observe(*(int(count) for count in Ranks(module.trainer).sum(counts).tolist()))


def record_validation(module: MeasuredModule, rollout: Rollout, validation: Validation) -> None:
    """Record rewards and pass@k of completions of held-out prompts.

    Args:
        module: Keeps the metrics.
        rollout: The completions.
        validation: Rule for correct completions.
    """
    from lightning_lm.evals import pass_at  # the tasks are not needed to train

    counted = [group for group, counts in enumerate(rollout.prompts["counted"]) if counts]
    rollout = rollout.take(counted)
    record_rewards(module, rollout)
    _record_lengths(module, rollout)
    right = (rollout.values[:, 0] >= validation.threshold).reshape(-1, rollout.samples).sum(1)
    for k in validation.pass_at:
        module.record(f"pass@{k}", pass_at(right, rollout.samples, k).sum(), len(counted))


def record_rewards(module: MeasuredModule, rollout: Rollout) -> None:
    """Record the mean of the weighted sums, and mean and deviation of each reward where it applies.

    Args:
        module: Keeps the metrics.
        rollout: The completions.
    """
    known = rollout.totals[~np.isnan(rollout.totals)]
    module.record("reward", known.sum(), len(known))
    for name, column in zip(rollout.names, rollout.values.T, strict=True):
        values = column[~np.isnan(column)]
        module.record(f"rewards/{name}/mean", values.sum(), len(values))
        module.record(f"rewards/{name}/std", values.std(ddof=1) if len(values) > 1 else 0.0, len(values) > 1)


def _record_lengths(module: MeasuredModule, rollout: Rollout) -> np.ndarray:
    lengths = np.array([len(answer.token_ids) for answer in rollout.completions], dtype=np.int64)
    ended = lengths[~rollout.truncated] if len(lengths) else lengths
    for kind, values in (("", lengths), ("terminated_", ended)):
        module.record(f"completions/mean_{kind}length", values.sum(), len(values))
        if len(values):
            module.record_max(f"completions/max_{kind}length", values.max())
            module.record_min(f"completions/min_{kind}length", values.min())
    module.record("completions/clipped_ratio", len(lengths) - len(ended), len(lengths))
    return lengths


def record_sampler(module: MeasuredModule, difference: Tensor, mask: Tensor) -> None:
    """Record how far the log-probabilities in training are from those at generation.

    Args:
        module: Keeps the metrics.
        difference: Log-probability in training minus that at generation, nats [rows, seq - 1].
        mask: The policy's own tokens.
    """
    distance = difference.abs().masked_fill(~mask, 0.0)
    ratio = difference.masked_fill(~mask, 0.0).exp()
    tokens = mask.sum()
    module.record("sampling/sampling_logp_difference/mean", distance.sum(), tokens)
    module.record_max("sampling/sampling_logp_difference/max", distance.max())
    module.record("sampling/importance_sampling_ratio/mean", ratio[mask].sum(), tokens)
    module.record_max("sampling/importance_sampling_ratio/max", ratio.max())
    module.record_min("sampling/importance_sampling_ratio/min", ratio.min())


@torch.no_grad()
def record_objective(module: MeasuredModule, terms: ObjectiveTerms, scores: TokenScores, mask: Tensor) -> None:
    """Record the objective of a micro-batch, its parts, and how often the ratio was clipped.

    Args:
        module: Keeps the metrics.
        terms: Terms of the objective.
        scores: Scores of the policy.
        mask: The policy's own tokens.
    """
    tokens = mask.sum()
    kept = mask.float()
    low, high = terms.policy.clipped_low & mask, terms.policy.clipped_high & mask
    means = {
        "entropy": (scores.entropies * kept).sum(),
        "ratio/mean": (terms.ratio * kept).sum(),
        "clip_ratio/low_mean": low.sum(),
        "clip_ratio/high_mean": high.sum(),
        "clip_ratio/region_mean": (low | high).sum(),
    }
    if terms.kl is not None:
        means["kl"] = (terms.kl * kept).sum()
    for name, total in means.items():
        module.record(name, total, tokens)
    module.record("policy_loss", torch.where(mask, terms.weights * terms.policy.loss, 0).sum(), terms.loss.num_tokens)
    neutral = torch.where(mask, terms.ratio, 1.0)
    module.record_max("ratio/max", neutral.max())
    module.record_min("ratio/min", neutral.min())

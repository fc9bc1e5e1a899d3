"""Group Relative Policy Optimization (GRPO)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_lm.data.post_training.prompts import PromptBatch
from lightning_lm.distributed import Ranks, data_rank
from lightning_lm.functional.advantages import Advantage, GroupAdvantage
from lightning_lm.models import ModelConfig
from lightning_lm.modules.rl.experience_loader import Experience
from lightning_lm.modules.rl.objective import Objective
from lightning_lm.modules.rl.policy import PolicyModule
from lightning_lm.modules.rl.rollout import Rollout, RolloutPlan
from lightning_lm.optim import AdamW, Constant, OptimizerPart, Schedule, SkipRule
from lightning_lm.rewards import Reward
from lightning_lm.types import IGNORE_INDEX

__all__ = ["GRPOModule"]


class GRPOModule(PolicyModule):
    """Raises the probability of completions whose reward is above the mean of their group, those of the same prompt.

    Watch the reward and ``val/pass@1``, not the loss: it is zero at the first step of each rollout, whatever was
    learned. Logged under ``train/``: ``reward``, ``reward_std``, ``frac_reward_zero_std`` (zero-variance groups),
    ``rewards/NAME/mean``, ``completions/...`` (lengths, fraction truncated), ``entropy``, ``kl``, ``clip_ratio/...``,
    ``ratio/...``, ``policy_loss``, ``sampling/...`` (training against generation), ``rollout/...``; under ``val/``:
    ``reward``, ``pass@k``, ``completions/...``.

    Args:
        model: The policy: a config, built once the tokenizer is known, or a module. Usually fine-tuned before.
        rewards: Score the completions: parts such as `ExactAnswer`, or functions of ``completions`` (a list) or
            ``completion`` (one) and any columns of the data, by name.
        plan: Sampling of completions, and the number of epochs over them.
        advantage: Advantage of a completion within its group; or the choice of the completions that are trained on.
        objective: Training objective.
        optimizer: Optimizer; it groups the parameters by their roles.
        schedule: Factor on the learning rates.
        skip: Rule for skipping a step; costs one synchronisation with the device at every step.

    Source:
        Shao et al. 2024, arXiv:2402.03300, section 4.1.

    Example:
        >>> from lightning_lm.models import TransformerConfig
        >>> from lightning_lm.rewards import ExactAnswer
        >>> module = GRPOModule(TransformerConfig(vocab_size=50, d_model=16, num_layers=1), rewards=[ExactAnswer()])
    """

    batch_type = PromptBatch
    batch_source = "PromptDataModule"

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        rewards: Sequence[Reward | Callable[..., Any]],
        plan: RolloutPlan = RolloutPlan(),
        advantage: Advantage = GroupAdvantage(),
        objective: Objective = Objective(),
        optimizer: OptimizerPart = AdamW(lr=1e-6, weight_decay=0.0),
        schedule: Schedule = Constant(warmup=5),
        skip: SkipRule | None = None,
    ) -> None:
        super().__init__(
            model,
            rewards=rewards,
            plan=plan,
            objective=objective,
            optimizer=optimizer,
            schedule=schedule,
            skip=skip,
        )
        self.advantage = advantage

    def compute_advantages(self, rollout: Rollout, rows: Experience) -> Experience:
        """Return the advantage of each completion, float32 [rows], 0 if no reward applies, and the labels."""
        rewards = torch.from_numpy(rollout.groups)
        # A baseline or a deviation of the whole batch is that of all ranks.
        everyone = Ranks(self.trainer).gather(rewards.to(self.device, torch.float32))
        of_ranks = self.advantage(everyone).view(-1, *rewards.shape)
        advantages = of_ranks[data_rank(self.trainer)].flatten()
        unused = advantages.isnan()
        labels = rows["labels"].masked_fill(unused[:, None], IGNORE_INDEX)
        return {"advantages": advantages.masked_fill(unused, 0.0), "labels": labels}

"""Proximal Policy Optimization (PPO), with a critic for per-token advantages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lm.data.post_training.prompts import PromptBatch
from lightning_lm.distributed import Ranks
from lightning_lm.functional.advantages import explained_variance, gae, whiten
from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.functional.policy import clipped_value_loss, kl_estimate
from lightning_lm.models import ModelConfig
from lightning_lm.models.roles import parameter_roles
from lightning_lm.modules.checkpoint import ENTRY
from lightning_lm.modules.rl.critic import Critic, KLReward, ValueModel
from lightning_lm.modules.rl.experience_loader import Experience
from lightning_lm.modules.rl.objective import Objective
from lightning_lm.modules.rl.policy import PolicyModule
from lightning_lm.modules.rl.rollout import Rollout, RolloutPlan
from lightning_lm.modules.token_losses import target_mask
from lightning_lm.optim import AdamW, CombinedOptimizer, Constant, OptimizerPart, Schedule
from lightning_lm.optim.optimizers import RoledParameter
from lightning_lm.rewards import Reward

__all__ = ["PPOModule"]


class PPOModule(PolicyModule):
    """Raises the probability of tokens whose return is above the critic's estimate.

    The critic begins as a copy of the policy. Logged besides what `GRPOModule` logs: ``value_loss``,
    ``explained_variance`` (of the returns by the critic before it learned from them: 0 is worthless, 1 perfect),
    ``values/mean``, ``returns/mean``, ``value_clip_ratio``, ``approx_kl`` (of the update), and with a `KLReward` ``kl``
    (nats per token), ``kl_coef`` and ``non_score_reward``.

    Args:
        model: The policy: a config, built once the tokenizer is known, or a module. Usually fine-tuned before.
        rewards: Score the completions: parts such as `ExactAnswer`, or functions of ``completions`` (a list) or
            ``completion`` (one) and any columns of the data, by name.
        plan: Sampling of completions, and the number of epochs over them.
        objective: Training objective of the policy.
        critic: Training of the critic.
        kl: Per-token KL penalty in the rewards; ``None`` for none.
        optimizer: Optimizer for policy and critic; it groups the parameters by their roles.
        schedule: Factor on the learning rates.

    Source:
        Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155, section 3.5.
    """

    batch_type = PromptBatch
    batch_source = "PromptDataModule"

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        rewards: Sequence[Reward | Callable[..., Any]],
        plan: RolloutPlan = RolloutPlan(samples_per_prompt=1),
        objective: Objective = Objective(),
        critic: Critic = Critic(),
        kl: KLReward | None = KLReward(),
        optimizer: OptimizerPart = AdamW(lr=1e-6, weight_decay=0.0),
        schedule: Schedule = Constant(warmup=5),
    ) -> None:
        super().__init__(model, rewards=rewards, plan=plan, objective=objective, optimizer=optimizer, schedule=schedule)
        self.critic_part, self.kl = critic, kl
        self.kl_coefficient = 0.0 if kl is None else kl.coefficient
        self.critic: ValueModel | None = None

    @property
    def needs_reference(self) -> bool:
        """True if rollouts store the reference's log-probabilities."""
        return self.kl is not None or super().needs_reference

    @property
    def needs_first_logprobs(self) -> bool:
        """True if rollouts store the policy's log-probabilities of all completions; the KL penalty is made of them."""
        return self.kl is not None or super().needs_first_logprobs

    def configure_model(self) -> None:
        """Build the policy, and the critic from it or from a model of its own, once."""
        super().configure_model()
        if self.critic is None:
            start = self.critic_part.model
            self.critic = ValueModel(self.model if start is None else start.build(self._vocab_size()))

    def on_train_start(self) -> None:
        """Switch dropout off."""
        super().on_train_start()
        self._values_of().eval()

    def _values_of(self) -> ValueModel:
        assert self.critic is not None, "configure_model() comes first"
        return self.critic

    def build_optimizer(self) -> Optimizer:
        """Return one optimizer with the groups of the policy and those of the critic."""
        policy = self.optimizer_part.build(self.model, parameter_roles(self.model))
        critic, scale = self._values_of(), self.critic_part.lr_scale
        roles = parameter_roles(critic)
        trained = [
            RoledParameter(f"critic.{name}", parameter, roles[name])
            for name, parameter in critic.named_parameters()
            if parameter.requires_grad
        ]
        children = self.optimizer_part.children(trained)
        for group in (group for child in children for group in child.param_groups):
            group.update(lr=group["lr"] * scale, name=f"critic_{group.get('name', 'all')}")
        return CombinedOptimizer([*policy.children, *children])

    # --- rollouts ---

    def compute_advantages(self, rollout: Rollout, rows: Experience) -> Experience:
        """Return advantages and returns of each token, and what the critic expected, float32 [rows, seq - 1]."""
        mask, ranks = target_mask(rows), Ranks(self.trainer)
        rewards = self._rewards(rollout, rows, mask, ranks)
        reward_sum, completions = ranks.sum(torch.stack([rewards.sum(), mask.any(1).sum()])).unbind()
        self._values_of().mean_reward.copy_(reward_sum / completions.clamp(min=1))
        values = self.in_chunks(self._values_of(), rows)
        advantages, returns = gae(rewards, values, mask, gamma=self.critic_part.gamma, lam=self.critic_part.lam)
        tokens = mask.sum()
        self.record("explained_variance", explained_variance(values, returns, mask) * tokens, tokens)
        self.record("values/mean", values.sum(), tokens)
        self.record("returns/mean", returns.sum(), tokens)
        return {"advantages": whiten(advantages, mask, all_reduce=ranks.sum), "returns": returns, "old_values": values}

    def _rewards(self, rollout: Rollout, rows: Experience, mask: Tensor, ranks: Ranks) -> Tensor:
        """Return the reward of each token: the KL penalty, and the completion's reward at its last token."""
        totals = torch.from_numpy(rollout.totals).nan_to_num(nan=0.0).to(mask.device, torch.float32)
        columns = torch.arange(mask.shape[1], device=mask.device)
        is_last = columns == (columns * mask).amax(1, keepdim=True)
        rewards = torch.where(is_last & mask, totals[:, None], 0.0)
        if self.kl is None:
            return rewards
        distance = kl_estimate(rows["old_logprobs"], rows["reference_logprobs"], self.kl.estimator) * mask
        rewards = rewards - self.kl_coefficient * distance
        answers = mask.any(1).sum()
        self.record("kl", distance.sum(), mask.sum())
        self.record("kl_coef", self.kl_coefficient)
        self.record("non_score_reward", -self.kl_coefficient * distance.sum(), answers)
        whole, number = ranks.sum(torch.stack([distance.sum(), answers.float()])).tolist()
        self.kl_coefficient = self.kl.adapted(self.kl_coefficient, whole / max(number, 1), round(number))
        return rewards

    # --- learning ---

    def training_loss(self, batch: Mapping[str, Any]) -> TokenLoss:
        """Return the sums of a micro-batch: the policy's objective, and the critic's error with the same weights."""
        terms, mask = self.objective_terms(batch), target_mask(batch)
        values, part = self._values_of()(batch), self.critic_part
        errors = clipped_value_loss(values, batch["old_values"], batch["returns"], clip=part.clip)
        error_sum = torch.where(mask, terms.weights * errors, 0).sum()
        self._record_critic(values, batch, mask)
        self.record("value_loss", error_sum, terms.loss.num_tokens)
        self.record("approx_kl", (0.5 * terms.ratio.log().square() * mask).sum(), mask.sum())
        loss = terms.loss
        added = part.coefficient * error_sum
        return TokenLoss(loss.loss_sum + added, loss.nll_sum + added.detach(), loss.num_tokens)

    @torch.no_grad()
    def _record_critic(self, values: Tensor, batch: Mapping[str, Any], mask: Tensor) -> None:
        if self.critic_part.clip is not None:
            moved = (values - batch["old_values"]).abs() > self.critic_part.clip
            self.record("value_clip_ratio", (moved & mask).sum(), mask.sum())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Hold the policy while the critic learns alone; otherwise as always."""
        if self.trainer.global_step < self.critic_part.warmup:
            for parameter in self.model.parameters():
                parameter.grad = None
        super().on_before_optimizer_step(optimizer)

    # --- checkpoints ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the KL coefficient."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[ENTRY]["kl_coefficient"] = self.kl_coefficient

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters and the KL coefficient."""
        super().on_load_checkpoint(checkpoint)
        self.kl_coefficient = checkpoint[ENTRY]["kl_coefficient"]

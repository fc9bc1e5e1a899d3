"""Base of reinforcement learning: a policy that trains on experience made of its own completions."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lm.data.prompts import PromptBatch
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.models import ModelConfig
from lightning_lm.modules.checkpoint import ENTRY
from lightning_lm.modules.experience import Experience, ExperienceLoader, PromptSource, keep_logprobs, staleness_of
from lightning_lm.modules.experience_maker import ExperienceMaker, Learner
from lightning_lm.modules.objective import Objective, ObjectiveTerms, learned_tokens
from lightning_lm.modules.plan import RolloutPlan
from lightning_lm.modules.reference import FrozenCopy
from lightning_lm.modules.resume_rollouts import describe_rollout, resume_behind_rollout
from lightning_lm.modules.rollout import Rollout, SparePrompts
from lightning_lm.modules.rollout_metrics import record_objective
from lightning_lm.optim import OptimizerPart, Schedule, SkipRule
from lightning_lm.protocols import Tokenizer
from lightning_lm.rewards import check_reward, check_weights

__all__ = ["PolicyModule"]


class PolicyModule(Learner, abc.ABC):
    """Trains a policy on its own answers, judged by rewards.

    A subclass says what the answers are worth (`judge`). Batches are `types.ExperienceBatch`, from the loader that
    `experience_loader` makes of prompts; a raw batch of prompts is answered first, which is plain on-policy training.
    Dropout is off, so that a fresh policy's ratio to itself is one.

    Args:
        model: The policy: a config, built once the tokenizer is known, or a module.
        rewards: Score the completions: parts such as `ExactAnswer`, or functions of ``completions`` (a list) or
            ``completion`` (one) and any columns of the data, by name.
        plan: Sampling of completions, and the number of epochs over them.
        objective: Training objective.
        optimizer: Optimizer; it groups the parameters by their roles.
        schedule: Factor on the learning rates.
        skip: Rule for skipping a step; costs one synchronisation with the device at every step.

    Attributes:
        tokenizer: Decodes answers where there is no datamodule that has a tokenizer.
        last_rollout: The newest answers of this rank, with their experience; for callbacks.
    """

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        rewards: Sequence[Callable[..., Any]],
        plan: RolloutPlan,
        objective: Objective,
        optimizer: OptimizerPart,
        schedule: Schedule,
        skip: SkipRule | None = None,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule, skip=skip)
        if not rewards:
            raise ConfigurationError("rewards is empty; give at least one, such as ExactAnswer().")
        for reward in rewards:
            check_reward(reward)
        check_weights(plan.reward_weights, rewards)
        self.rewards, self.plan, self.objective = list(rewards), plan, objective
        self.tokenizer: Tokenizer | None = None
        self.last_rollout: tuple[Rollout, Experience] | None = None
        self.reference: FrozenCopy | None = None
        self._steps_per_rollout = 1
        self.maker = ExperienceMaker(self)

    @property
    def needs_reference(self) -> bool:
        """True if rollouts store the reference's log-probabilities."""
        return self.objective.kl is not None

    @property
    def needs_first_logprobs(self) -> bool:
        """True if rollouts also store the log-probabilities that the first step computes anyway."""
        plan = self.plan
        may_be_late = plan.max_staleness is not None and plan.max_staleness >= plan.steps
        return plan.importance_cap is not None or plan.backend.has_own_weights or may_be_late

    # --- model ---

    def configure_model(self) -> None:
        """Build the model, and the copy that the objective compares it with, once."""
        super().configure_model()
        self.model.train()  # a loaded model may not be, and Lightning would warn of it
        if self.needs_reference and self.reference is None:
            self.reference = FrozenCopy(self.model)

    def on_train_start(self) -> None:
        """Switch dropout off."""
        super().on_train_start()
        self.model.eval()
        self.maker.begin()

    def on_train_end(self) -> None:
        """Say so if nothing was learned."""
        super().on_train_end()
        self.maker.end()

    def _tokenizer(self) -> Any:
        return super()._tokenizer() or self.tokenizer

    # --- rollouts ---

    def experience_loader(self, prompts: PromptSource) -> ExperienceLoader:
        """Return a loader of experience from prompts; a datamodule gives it to the Trainer.

        Args:
            prompts: Prompts of this rank.
        """
        self._steps_per_rollout = self.plan.steps
        return ExperienceLoader(self.collect, prompts, self.plan, self.trainer)

    @torch.no_grad()
    def collect(
        self, prompts: PromptBatch, spare: SparePrompts | None = None, *, micro_batch: int | None = None
    ) -> Experience:
        """Answer prompts and return all that is needed to learn from the answers; as `ExperienceMaker.collect`."""
        self.last_rollout = self.maker.collect(prompts, spare, micro_batch)
        return self.last_rollout[1]

    # --- learning ---

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Learn from experience, as fresh as the plan says; where prompts come, answer them first."""
        if "prompt_ids" in batch:
            batch = self.collect(batch, micro_batch=batch_idx % self.trainer.accumulate_grad_batches)
        self.record("rollout/staleness", staleness_of(batch, self.plan, self.trainer.global_step))
        return super().training_step(batch, batch_idx)

    def training_loss(self, batch: Mapping[str, Any]) -> TokenLoss:
        """Return the sums of a micro-batch of experience."""
        return self.objective_terms(batch).loss

    def objective_terms(self, batch: Mapping[str, Any]) -> ObjectiveTerms:
        """Return what the objective says of a micro-batch, recorded, and keep what later epochs compare with."""
        scores = self.scores(self.model, batch)
        terms = self.objective(scores, batch)
        record_objective(self, terms, scores, learned_tokens(batch))
        if "row_ids" in batch and self.last_rollout is not None:
            keep_logprobs(self.last_rollout[1], batch["row_ids"], scores.logprobs)
        return terms

    def target_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the number of learned tokens: the loss may count answers."""
        return learned_tokens(batch).sum()

    def evaluate_batch(self, batch: PromptBatch) -> dict[str, Tensor]:
        """Answer held-out prompts and record what the answers earn; no likelihood is measured."""
        self.maker.validate(batch)
        nothing = torch.zeros((), device=self.device)
        return {"nll_sum": nothing, "num_tokens": nothing.long(), "target_ids": nothing.new_zeros(0).long()}

    # --- checkpoints ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how many batches a rollout gives, to know later whether it was finished."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[ENTRY]["rollout"] = describe_rollout(self._steps_per_rollout, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters; drop the rest of a rollout that was not finished."""
        super().on_load_checkpoint(checkpoint)
        trainer = self._trainer  # none where a checkpoint is only loaded
        if trainer is not None and trainer.state.fn == "fit":
            fit_loop = checkpoint["loops"]["fit_loop"]
            resume_behind_rollout(fit_loop, checkpoint[ENTRY]["rollout"], self.plan.steps, trainer)

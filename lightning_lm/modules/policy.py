"""What reinforcement learning shares: rollouts as a source of batches, the objective, and validation by answers."""

import abc
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lm.data.permutation import key_of
from lightning_lm.data.prompts import PromptBatch
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.functional.logprobs import TokenScores
from lightning_lm.models import ModelConfig
from lightning_lm.modules.base import LMModule
from lightning_lm.modules.checkpoint import ENTRY
from lightning_lm.modules.experience import (
    Experience,
    ExperienceLoader,
    PromptSource,
    describe_rollout,
    keep_logprobs,
    learning_orders,
    recorded_logprobs,
    resume_behind_rollout,
)
from lightning_lm.modules.objective import Objective, ObjectiveTerms, learned_tokens
from lightning_lm.modules.plan import RolloutPlan
from lightning_lm.modules.ranks import Ranks, data_rank
from lightning_lm.modules.reference import FrozenCopy
from lightning_lm.modules.rollout import Rollout, RolloutEngine, SparePrompts
from lightning_lm.modules.rollout_metrics import record_objective, record_rollout, record_sampler, record_validation
from lightning_lm.modules.scores import token_scores
from lightning_lm.modules.server_weights import ServerWeights
from lightning_lm.optim import OptimizerPart, Schedule, SkipRule
from lightning_lm.protocols import RewardFunction, Tokenizer

__all__ = ["PolicyModule"]


class PolicyModule(LMModule, abc.ABC):
    """Trains a policy on its own answers, judged by rewards.

    A subclass says what the answers are worth (`judge`). Batches are `types.ExperienceBatch`, from the loader that
    `experience_loader` makes of prompts; a raw batch of prompts is answered first, which is plain on-policy training.
    Dropout is off, so that a fresh policy's ratio to itself is one.

    Args:
        model: The policy: a config, built once the tokenizer is known, or a module.
        rewards: Judge the answers.
        plan: How prompts are answered, and how often the answers are learned from.
        objective: What is minimised.
        optimizer: Chooses by the parameters' roles.
        schedule: Factor on the learning rates.
        skip: When to leave out a step; costs one synchronisation with the device at every step.

    Attributes:
        tokenizer: Decodes answers where there is no datamodule that has a tokenizer.
        last_rollout: The newest answers of this rank, with their experience; for callbacks.
    """

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        rewards: Sequence[RewardFunction],
        plan: RolloutPlan,
        objective: Objective,
        optimizer: OptimizerPart,
        schedule: Schedule,
        skip: SkipRule | None = None,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule, skip=skip)
        if not rewards:
            raise ConfigurationError("rewards is empty; give at least one, such as ExactAnswer().")
        if objective.ratio_to == "sampler" and plan.importance_cap is not None:
            raise ConfigurationError(
                f"importance_cap={plan.importance_cap} weighs the policy against the sampler, and ratio_to='sampler' "
                "takes them for the same. Use ratio_to='policy', or no importance_cap."
            )
        self.rewards, self.plan, self.objective = list(rewards), plan, objective
        self.tokenizer: Tokenizer | None = None
        self.last_rollout: tuple[Rollout, Experience] | None = None
        self.reference: FrozenCopy | None = None
        self._steps_per_rollout = 1
        self._server = ServerWeights(plan) if plan.backend.has_own_weights else None

    @abc.abstractmethod
    def judge(self, rollout: Rollout, rows: Experience) -> Experience:
        """Return what is added to the experience: at least ``advantages``, [rows] or [rows, seq - 1].

        It may have other ``labels``, if something is not to be learned from after all.

        Args:
            rollout: The answers of this rank and what they earned.
            rows: The experience so far.
        """

    @property
    def needs_reference(self) -> bool:
        """Whether rollouts hold the reference's log-probabilities."""
        return self.objective.kl is not None

    @property
    def needs_first_logprobs(self) -> bool:
        """Whether rollouts hold log-probabilities also of what the first step learns, which computes them anyway."""
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
        if self._server is not None:
            self._server = ServerWeights(self.plan)  # what an earlier run has pushed may be gone

    def _tokenizer(self) -> Any:
        return super()._tokenizer() or self.tokenizer

    # --- rollouts ---

    def experience_loader(self, prompts: PromptSource) -> ExperienceLoader:
        """Return a loader of experience from prompts; a datamodule gives it to the Trainer.

        Args:
            prompts: Of this rank.
        """
        self._steps_per_rollout = self.plan.steps
        return ExperienceLoader(self.collect, prompts, self.plan, self.trainer)

    @torch.no_grad()
    def collect(
        self, prompts: PromptBatch, spare: SparePrompts | None = None, *, micro_batch: int | None = None
    ) -> Experience:
        """Answer prompts and return all that is needed to learn from the answers, in the order of `learning_orders`.

        Args:
            prompts: Of this rank.
            spare: Where prompts come from that take the place of ones that teach nothing.
            micro_batch: Number within the optimizer step, where each micro-batch has its own rollout, and all of it is
                learned at once.
        """
        start_s, version = time.monotonic(), self.trainer.global_step
        age = 0 if self._server is None else self._server.update(self.model, self._tokenizer(), self.trainer)
        rollout = self._engine().collect(prompts, (self._seed or 0, version, micro_batch or 0), spare)
        rollout = dataclasses.replace(rollout, sampler_age=age)
        rows: Experience = rollout.rows(mask_truncated=self.plan.mask_truncated, device=self.device)
        rows |= {"policy_version": version}
        with self.trainer.precision_plugin.forward_context():
            rows |= self._compared(rollout, rows, steps=self.plan.steps if micro_batch is None else 1)
            rows |= self.judge(rollout, rows)
        mask = learned_tokens(rows)
        tokens, count = Ranks(self.trainer).sum(torch.tensor([mask.sum(), len(mask)], device=self.device)).tolist()
        rows |= {"tokens_per_row": tokens / count}
        self.last_rollout = rollout, rows
        record_rollout(self, rollout, time.monotonic() - start_s)
        return rows

    def _engine(self) -> RolloutEngine:
        tokenizer = self._tokenizer()
        if tokenizer is None:
            raise ConfigurationError(
                "Rewards read text, and there is no tokenizer. Train with PromptDataModule, or set module.tokenizer."
            )
        return RolloutEngine(self.model, tokenizer, self.rewards, self.plan, self.trainer)

    def _compared(self, rollout: Rollout, rows: Experience, *, steps: int) -> Experience:
        """Return log-probabilities of the policy before any update, where they are needed, and of the reference."""
        found: Experience = {}
        if steps > 1 or self.needs_first_logprobs:
            sampler = self.objective.ratio_to == "sampler"
            found |= recorded_logprobs(rollout, rows) if sampler else self._old_logprobs(rollout, rows)
        if self.reference is not None:
            reference = self.reference.model
            found["reference_logprobs"] = self.in_chunks(lambda part: self.scores(reference, part).logprobs, rows)
        return found

    def _old_logprobs(self, rollout: Rollout, rows: Experience) -> Experience:
        """Return those of the policy that learns, and what they say of the one that sampled."""
        mask, order = learned_tokens(rows), learning_orders(rows, self.plan)[0]
        num_fresh = 0 if self.needs_first_logprobs else len(order) // self.plan.minibatches
        scored = order[num_fresh:].sort().values
        old = torch.full(mask.shape, torch.nan, device=mask.device)
        if len(scored):
            old[scored] = self.in_chunks(lambda part: self.scores(self.model, part).logprobs, rows, scored)
            difference = old - rollout.sampler_logprobs(old)
            record_sampler(self, difference, mask & ~old.isnan())
        found: Experience = {"old_logprobs": old, "num_fresh": num_fresh}
        if self.plan.importance_cap is not None:
            found["importance_weights"] = difference.exp().clamp(max=self.plan.importance_cap)
        return found

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenScores:
        """Return log-probabilities and entropies at the temperature of sampling.

        Args:
            model: The policy or its reference.
            batch: Rows.
        """
        temperature, bonus = self.plan.sampling.temperature, self.objective.entropy_coefficient
        return token_scores(model, batch, temperature=temperature, entropy_gradient=bonus != 0)

    def in_chunks(
        self, function: Callable[[Experience], Tensor], rows: Experience, chosen: Tensor | None = None
    ) -> Tensor:
        """Apply a function to as many rows at once as a micro-batch has, and return all results.

        Args:
            function: Maps rows to one result each.
            rows: Experience.
            chosen: Numbers of the rows that are wanted; left out, all.
        """
        number = self.plan.minibatches * self.trainer.accumulate_grad_batches
        size = self.plan.rows_at_once or -(-len(rows["labels"]) // number)
        names = [name for name in ("input_ids", "labels", "prompt_numbers", "prompt_lengths") if name in rows]
        columns = [(rows[name] if chosen is None else rows[name][chosen]).split(size) for name in names]
        parts = zip(*columns, strict=True)
        return torch.cat([function(dict(zip(names, part, strict=True))) for part in parts])

    # --- learning ---

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Learn from experience; where prompts come, answer them first.

        Raises:
            ConfigurationError: If the experience is older than the plan allows.
        """
        if "prompt_ids" in batch:
            batch = self.collect(batch, micro_batch=batch_idx % self.trainer.accumulate_grad_batches)
        staleness = self.trainer.global_step - batch.get("policy_version", self.trainer.global_step)
        limit = self.plan.steps - 1 if self.plan.max_staleness is None else self.plan.max_staleness
        if "old_logprobs" not in batch:
            limit = 0  # what this step computes must be those of the policy that sampled
        if staleness > limit:
            raise ConfigurationError(
                f"Experience is {staleness} optimizer steps old, and the plan allows {limit}. A loader without a "
                "length makes Lightning fetch ahead; give it one, or raise max_staleness."
            )
        self.record("rollout/staleness", staleness)
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
        plan = self.plan.validation
        sampling = dataclasses.replace(plan.sampling, seed=key_of("validation", data_rank(self.trainer)))
        record_validation(self, self._engine().answer(batch, plan.samples, sampling, held_out=True), plan)
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

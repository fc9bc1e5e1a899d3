"""Base of reinforcement learning: a policy that trains on completions it has sampled itself.

`PolicyModule.collect` makes the experience of a rollout, in this order: completions, rewards, log-probabilities of the
policy before any update and of its reference, advantages. `ExperienceLoader` divides it into micro-batches, and
`training_step` trains on them. When the log-probabilities before the update are computed, and when the first optimizer
step supplies them for nothing, is explained in `lightning_lm.modules.rl.experience_loader`.
"""

import abc
import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lm._lightning import trainer_of
from lightning_lm.data.permutation import key_of
from lightning_lm.data.post_training.prompts import PromptBatch
from lightning_lm.distributed import Ranks, data_rank
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.functional.logprobs import TokenScores
from lightning_lm.models import ModelConfig
from lightning_lm.modules.base import LMModule
from lightning_lm.modules.checkpoint import ENTRY
from lightning_lm.modules.preference.reference import FrozenCopy
from lightning_lm.modules.rl.experience_loader import (
    Experience,
    ExperienceLoader,
    PromptSource,
    describe_rollout,
    policy_logprobs,
    recorded_logprobs,
    resume_after_rollout,
    staleness_of,
    with_old_logprobs,
)
from lightning_lm.modules.rl.metrics import record_objective, record_rollout, record_sampler, record_validation
from lightning_lm.modules.rl.objective import Objective, ObjectiveTerms
from lightning_lm.modules.rl.rollout import Rollout, RolloutEngine, RolloutPlan, ServerWeights, SparePrompts
from lightning_lm.modules.token_losses import target_mask, token_scores
from lightning_lm.optim import OptimizerPart, Schedule, SkipRule
from lightning_lm.protocols import Tokenizer
from lightning_lm.rewards import check_reward, check_weights

__all__ = ["PolicyModule"]


class _RenamedScores:
    """The method `PolicyModule.token_scores` by its old name, for callers and for subclasses that override it."""

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenScores:
        """Return `PolicyModule.token_scores`; version 0.3 removes this name.

        Args:
            model: The policy or its reference.
            batch: Rows.
        """
        assert isinstance(self, PolicyModule)
        return PolicyModule.token_scores(self, model, batch)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "scores" in vars(cls):
            text = f"{cls.__name__}.scores is now called token_scores; version 0.3 removes the old name."
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            cls.token_scores = vars(cls)["scores"]  # type: ignore[attr-defined]


class PolicyModule(LMModule, _RenamedScores, abc.ABC):
    """Trains a policy on its own completions, scored by rewards.

    A subclass computes the advantages (`compute_advantages`). Batches are `types.ExperienceBatch`, from the loader that
    `experience_loader` makes of prompts; for a raw batch of prompts a rollout is collected first, which is plain
    on-policy training. Dropout is off, so that a fresh policy's ratio to itself is one.

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
        tokenizer: Decodes completions if there is no datamodule that has a tokenizer.
        last_rollout: The newest completions of this rank, with their experience; for callbacks.

    Raises:
        ConfigurationError: If there is no reward, or the plan and the objective contradict each other.
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
        _check(rewards, plan, objective)
        self.rewards, self.plan, self.objective = list(rewards), plan, objective
        self.tokenizer: Tokenizer | None = None
        self.last_rollout: tuple[Rollout, Experience] | None = None
        self.reference: FrozenCopy | None = None
        self._steps_per_rollout = 1
        self._begin_run()

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
        self._begin_run()

    def _begin_run(self) -> None:
        backend = self.plan.backend
        self._server = ServerWeights(self.plan) if backend.has_own_weights else None  # an earlier run's may be gone
        self._num_completions, self._has_signal = 0, False

    def on_train_end(self) -> None:
        """Warn if no reward gave a learning signal. Collective: call on all ranks."""
        super().on_train_end()
        found = torch.tensor([self._num_completions, self._has_signal], device=self.device)
        completions, signals = Ranks(self.trainer).sum(found).tolist()
        if completions and not signals:
            rank_zero_warn(
                f"Nothing was learned from the {int(completions):,} completions of this run: their rewards were all 0, "
                "or equal within each group. Look at some (the Completions callback writes them); then use easier "
                "prompts, a model that is fine-tuned on the task first, or more samples_per_prompt."
            )

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

    @abc.abstractmethod
    def compute_advantages(self, rollout: Rollout, rows: Experience) -> Experience:
        """Return what is added to the experience: at least ``advantages``, [rows] or [rows, seq - 1].

        It may have other ``labels``, if something is not to be trained on after all.

        Args:
            rollout: The completions of this rank and their rewards.
            rows: The experience so far.
        """

    @torch.no_grad()
    def collect(
        self, prompts: PromptBatch, spare: SparePrompts | None = None, *, micro_batch: int | None = None
    ) -> Experience:
        """Return the experience of a new rollout; the first `epoch_orders` gives the order of its first epoch.

        Args:
            prompts: Prompts of this rank.
            spare: Source of prompts that replace those without a learning signal.
            micro_batch: Index within the optimizer step, if each micro-batch has its own rollout, all of which is
                trained on at once.
        """
        plan, trainer = self.plan, self.trainer
        start_s, version = time.monotonic(), trainer.global_step
        age = 0 if self._server is None else self._server.update(self.model, self.trained_tokenizer(), trainer)
        rollout = self._engine().rollout(prompts, (self._seed or 0, version, micro_batch or 0), spare)
        rollout = dataclasses.replace(rollout, sampler_age=age)
        rows: Experience = rollout.rows(mask_truncated=plan.mask_truncated, device=self.device)
        rows |= {"policy_version": version}
        with trainer.precision_plugin.forward_context():
            rows |= self._compared(rollout, rows, steps=plan.steps if micro_batch is None else 1)
            rows |= self.compute_advantages(rollout, rows)
        self._num_completions += len(rollout)
        self._has_signal |= bool((rows["advantages"] != 0).any()) and bool((np.nan_to_num(rollout.totals) != 0).any())
        mask = target_mask(rows)
        tokens, count = Ranks(trainer).sum(torch.tensor([mask.sum(), len(mask)], device=self.device)).tolist()
        rows |= {"tokens_per_row": tokens / count}
        record_rollout(self, rollout, time.monotonic() - start_s)
        self.last_rollout = rollout, rows
        return rows

    def _engine(self) -> RolloutEngine:
        tokenizer = self._tokenizer()
        if tokenizer is None:
            raise ConfigurationError(
                "Rewards read text, and there is no tokenizer. Train with PromptDataModule, or set module.tokenizer."
            )
        return RolloutEngine(self.model, tokenizer, self.rewards, self.plan, self.trainer)

    def _compared(self, rollout: Rollout, rows: Experience, *, steps: int) -> Experience:
        """Return log-probabilities of the policy before any update, if they are needed, and of the reference."""
        plan, found = self.plan, Experience()
        if steps > 1 or self.needs_first_logprobs:
            if self.objective.ratio_to == "sampler":
                found |= recorded_logprobs(rollout, rows)
            else:
                found |= policy_logprobs(
                    rows, plan, lambda some: self._logprobs(self.model, rows, some), all_rows=self.needs_first_logprobs
                )
                old = found["old_logprobs"]
                difference = old - rollout.sampler_logprobs(old)
                if found["num_fresh"] < len(old):
                    record_sampler(self, difference, target_mask(rows) & ~old.isnan())
                if plan.importance_cap is not None:
                    found["importance_weights"] = difference.exp().clamp(max=plan.importance_cap)
        if self.reference is not None:
            found["reference_logprobs"] = self._logprobs(self.reference.model, rows)
        return found

    def _logprobs(self, model: nn.Module, rows: Experience, chosen: Tensor | None = None) -> Tensor:
        return self.in_chunks(lambda part: self.token_scores(model, part).logprobs, rows, chosen)

    def in_chunks(self, score: Callable[[Experience], Tensor], rows: Experience, ids: Tensor | None = None) -> Tensor:
        """Apply a function to as many rows at once as a micro-batch has, and return all results.

        Args:
            score: Function of rows that returns one result each.
            rows: Experience.
            ids: Indices of the rows; by default all.
        """
        plan, parts = self.plan, self.plan.minibatches * self.trainer.accumulate_grad_batches
        size = plan.rows_at_once or -(-len(rows["labels"]) // parts)
        ids = torch.arange(len(rows["labels"]), device=rows["labels"].device) if ids is None else ids
        inputs = {name: rows[name] for name in ("input_ids", "labels")}
        chunks = ({name: value[part] for name, value in inputs.items()} for part in ids.split(size))
        return torch.cat([score(chunk) for chunk in chunks])

    # --- training ---

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Train on experience, as fresh as the plan says; collect a rollout first if prompts come."""
        if "prompt_ids" in batch:
            batch = self.collect(batch, micro_batch=batch_idx % self.trainer.accumulate_grad_batches)
        self.record("rollout/staleness", staleness_of(batch, self.plan, self.trainer.global_step))
        return super().training_step(batch, batch_idx)

    def training_loss(self, batch: Mapping[str, Any]) -> TokenLoss:
        """Return the sums of a micro-batch of experience."""
        return self.objective_terms(batch).loss

    def objective_terms(self, batch: Mapping[str, Any]) -> ObjectiveTerms:
        """Return the terms of the objective, recorded."""
        scores = self.token_scores(self.model, batch)
        rollout = None if self.last_rollout is None else self.last_rollout[1]
        terms = self.objective(scores, with_old_logprobs(batch, scores.logprobs, rollout))
        record_objective(self, terms, scores, target_mask(batch))
        return terms

    def token_scores(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenScores:
        """Return log-probabilities and entropies at the temperature of sampling.

        Args:
            model: The policy or its reference.
            batch: Rows.
        """
        temperature, bonus = self.plan.sampling.temperature, self.objective.entropy_coefficient
        return token_scores(model, batch, temperature=temperature, entropy_gradient=bonus != 0)

    def target_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the number of target tokens: the loss may count completions."""
        return target_mask(batch).sum()

    def evaluate_batch(self, batch: PromptBatch) -> dict[str, Tensor]:
        """Complete held-out prompts and record the rewards; no likelihood is measured."""
        plan = self.plan.validation
        sampling = dataclasses.replace(plan.sampling, seed=key_of("validation", data_rank(self.trainer)))
        rollout = self._engine().complete(batch, plan.samples, sampling, held_out=True)
        rollout.require_rewards()
        record_validation(self, rollout, plan)
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
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == "fit":
            fit_loop = checkpoint["loops"]["fit_loop"]
            resume_after_rollout(fit_loop, checkpoint[ENTRY]["rollout"], self.plan.steps, trainer)


def _check(rewards: Sequence[Callable[..., Any]], plan: RolloutPlan, objective: Objective) -> None:
    if not rewards:
        raise ConfigurationError("rewards is empty; give at least one, such as ExactAnswer().")
    for reward in rewards:
        check_reward(reward)
    check_weights(plan.reward_weights, rewards)
    if objective.ratio_to == "sampler" and plan.importance_cap is not None:
        raise ConfigurationError(
            f"importance_cap={plan.importance_cap} weighs the policy against the sampler, and ratio_to='sampler' "
            "takes them for the same. Use ratio_to='policy', or no importance_cap."
        )

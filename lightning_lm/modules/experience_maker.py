"""Experience from rollouts: answers to prompts, what they earned, and what other policies say of them."""

import abc
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lm.data.permutation import key_of
from lightning_lm.data.prompts import PromptBatch
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.logprobs import TokenScores
from lightning_lm.modules.base import LMModule
from lightning_lm.modules.experience import Experience, learning_orders, recorded_logprobs
from lightning_lm.modules.objective import Objective, learned_tokens
from lightning_lm.modules.plan import RolloutPlan
from lightning_lm.modules.ranks import Ranks, data_rank
from lightning_lm.modules.reference import FrozenCopy
from lightning_lm.modules.rollout import Rollout, RolloutEngine, SparePrompts
from lightning_lm.modules.rollout_metrics import record_rollout, record_sampler, record_validation
from lightning_lm.modules.scores import token_scores
from lightning_lm.modules.server_weights import ServerWeights

__all__ = ["ExperienceMaker", "Learner"]


class Learner(LMModule, abc.ABC):
    """Interface of a module that trains on its own completions, for the maker of its experience."""

    rewards: list[Callable[..., Any]]
    plan: RolloutPlan
    objective: Objective
    reference: FrozenCopy | None

    @property
    @abc.abstractmethod
    def needs_first_logprobs(self) -> bool:
        """True if rollouts also store the log-probabilities that the first step computes anyway."""

    @abc.abstractmethod
    def judge(self, rollout: Rollout, rows: Experience) -> Experience:
        """Return what is added to the experience: at least ``advantages``, [rows] or [rows, seq - 1].

        It may have other ``labels``, if something is not to be learned from after all.

        Args:
            rollout: The answers of this rank and what they earned.
            rows: The experience so far.
        """

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenScores:
        """Return log-probabilities and entropies at the temperature of sampling.

        Args:
            model: The policy or its reference.
            batch: Rows.
        """
        temperature, bonus = self.plan.sampling.temperature, self.objective.entropy_coefficient
        return token_scores(model, batch, temperature=temperature, entropy_gradient=bonus != 0)


class ExperienceMaker:
    """Answers prompts with the policy as it is, and returns all that is needed to learn from the answers.

    Args:
        module: Has the policy, judges its answers and keeps the metrics.

    Raises:
        ConfigurationError: If the plan and the objective contradict each other.
    """

    def __init__(self, module: Learner) -> None:
        plan = module.plan
        if module.objective.ratio_to == "sampler" and plan.importance_cap is not None:
            raise ConfigurationError(
                f"importance_cap={plan.importance_cap} weighs the policy against the sampler, and ratio_to='sampler' "
                "takes them for the same. Use ratio_to='policy', or no importance_cap."
            )
        self._module = module
        self.begin()

    def begin(self) -> None:
        """Begin a run: what an earlier one has pushed to a server may be gone."""
        plan = self._module.plan
        self._server = ServerWeights(plan) if plan.backend.has_own_weights else None
        self._completions, self._has_signal = 0, False

    def end(self) -> None:
        """End a run: say so if no reward gave anything to learn from. Collective: call on all ranks."""
        module = self._module
        found = torch.tensor([self._completions, self._has_signal], device=module.device)
        completions, signals = Ranks(module.trainer).sum(found).tolist()
        if completions and not signals:
            rank_zero_warn(
                f"Nothing was learned from the {int(completions):,} completions of this run: their rewards were all 0, "
                "or equal within each group. Look at some (the Completions callback writes them); then use easier "
                "prompts, a model that is fine-tuned on the task first, or more samples_per_prompt."
            )

    def collect(
        self, prompts: PromptBatch, spare: SparePrompts | None, micro_batch: int | None
    ) -> tuple[Rollout, Experience]:
        """Return a rollout and its experience, in the order of `learning_orders`.

        Args:
            prompts: Prompts of this rank.
            spare: Source of prompts that replace those without a learning signal.
            micro_batch: Number within the optimizer step, where each micro-batch has its own rollout, and all of it is
                learned at once.
        """
        module, plan, trainer = self._module, self._module.plan, self._module.trainer
        start_s, version = time.monotonic(), trainer.global_step
        age = 0 if self._server is None else self._server.update(module.model, module.trained_tokenizer(), trainer)
        rollout = self._engine().collect(prompts, (module._seed or 0, version, micro_batch or 0), spare)
        rollout = dataclasses.replace(rollout, sampler_age=age)
        rows: Experience = rollout.rows(mask_truncated=plan.mask_truncated, device=module.device)
        rows |= {"policy_version": version}
        with trainer.precision_plugin.forward_context():
            rows |= self._compared(rollout, rows, steps=plan.steps if micro_batch is None else 1)
            rows |= module.judge(rollout, rows)
        self._completions += len(rollout)
        self._has_signal |= bool((rows["advantages"] != 0).any()) and bool((np.nan_to_num(rollout.totals) != 0).any())
        mask = learned_tokens(rows)
        tokens, count = Ranks(trainer).sum(torch.tensor([mask.sum(), len(mask)], device=module.device)).tolist()
        rows |= {"tokens_per_row": tokens / count}
        record_rollout(module, rollout, time.monotonic() - start_s)
        return rollout, rows

    def validate(self, prompts: PromptBatch) -> None:
        """Answer held-out prompts and record what the answers earn.

        Args:
            prompts: Prompts of this rank.
        """
        module, plan = self._module, self._module.plan.validation
        sampling = dataclasses.replace(plan.sampling, seed=key_of("validation", data_rank(module.trainer)))
        rollout = self._engine().answer(prompts, plan.samples, sampling, held_out=True)
        rollout.require_rewards()
        record_validation(module, rollout, plan)

    def _engine(self) -> RolloutEngine:
        module, tokenizer = self._module, self._module._tokenizer()
        if tokenizer is None:
            raise ConfigurationError(
                "Rewards read text, and there is no tokenizer. Train with PromptDataModule, or set module.tokenizer."
            )
        return RolloutEngine(module.model, tokenizer, module.rewards, module.plan, module.trainer)

    def _compared(self, rollout: Rollout, rows: Experience, *, steps: int) -> Experience:
        """Return log-probabilities of the policy before any update, where they are needed, and of the reference."""
        module, found = self._module, Experience()
        if steps > 1 or module.needs_first_logprobs:
            sampler = module.objective.ratio_to == "sampler"
            found |= recorded_logprobs(rollout, rows) if sampler else self._old_logprobs(rollout, rows)
        if module.reference is not None:
            found["reference_logprobs"] = self._logprobs(module.reference.model, rows)
        return found

    def _old_logprobs(self, rollout: Rollout, rows: Experience) -> Experience:
        """Return those of the policy that learns, and what they say of the one that sampled."""
        module, plan = self._module, self._module.plan
        mask, order = learned_tokens(rows), learning_orders(rows, plan)[0]
        num_fresh = 0 if module.needs_first_logprobs else len(order) // plan.minibatches
        scored = order[num_fresh:].sort().values
        old = torch.full(mask.shape, torch.nan, device=mask.device)
        if len(scored):
            old[scored] = self._logprobs(module.model, rows, scored)
            difference = old - rollout.sampler_logprobs(old)
            record_sampler(module, difference, mask & ~old.isnan())
        found: Experience = {"old_logprobs": old, "num_fresh": num_fresh}
        if plan.importance_cap is not None:
            found["importance_weights"] = difference.exp().clamp(max=plan.importance_cap)
        return found

    def _logprobs(self, model: nn.Module, rows: Experience, chosen: Tensor | None = None) -> Tensor:
        return self.in_chunks(lambda part: self._module.scores(model, part).logprobs, rows, chosen)

    def in_chunks(
        self, function: Callable[[Experience], Tensor], rows: Experience, chosen: Tensor | None = None
    ) -> Tensor:
        """Apply a function to as many rows at once as a micro-batch has, and return all results.

        Args:
            function: Maps rows to one result each.
            rows: Experience.
            chosen: Numbers of the rows that are wanted; left out, all.
        """
        plan, labels = self._module.plan, rows["labels"]
        chosen = torch.arange(len(labels), device=labels.device) if chosen is None else chosen
        size = plan.rows_at_once or -(-len(labels) // (plan.minibatches * self._module.trainer.accumulate_grad_batches))
        names = [name for name in ("input_ids", "labels", "prompt_numbers", "prompt_lengths") if name in rows]
        return torch.cat([function({name: rows[name][part] for name in names}) for part in chosen.split(size)])

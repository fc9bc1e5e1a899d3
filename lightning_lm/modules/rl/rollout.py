"""Rollouts: their plan, and completions sampled from the policy in training, with their rewards."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lm.data.permutation import key_of
from lightning_lm.data.post_training.prompts import PromptBatch, join_prompts, take_prompts
from lightning_lm.distributed import Ranks, whole_model
from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Backend, Completion, OwnBackend, PolicyAtWork, Sampling
from lightning_lm.modules.signals import go_on_together, interruptible
from lightning_lm.parts import Limit, Part
from lightning_lm.protocols import Tokenizer
from lightning_lm.rewards import RewardError, RewardFailure, RewardTable, Scoring, check_reward, score
from lightning_lm.types import IGNORE_INDEX

__all__ = ["Rollout", "RolloutEngine", "RolloutPlan", "ServerWeights", "SparePrompts", "Validation"]

SparePrompts = Callable[[int, int], PromptBatch]
"""Returns prompts that take the place of others, given the round and how many are needed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation(Part, limits={"threshold": Limit.FINITE}):
    """Validation on held-out prompts: always with the weights in training, never by a server that has its own.

    Args:
        samples: Completions of each prompt.
        sampling: Sampling settings; greedy by default. The noise is the same each time.
        pass_at: The ``k`` of each ``val/pass@k``: how likely one of ``k`` completions is right.
        threshold: A completion is right if the first reward gives at least this.
    """

    samples: int = 1
    sampling: Sampling = Sampling(temperature=0.0)
    pass_at: tuple[int, ...] = (1,)
    threshold: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        super().__post_init__()
        if self.samples < 1 or min(self.pass_at, default=1) < 1:
            raise ConfigurationError(f"samples={self.samples} and each of pass_at={self.pass_at} must be at least 1.")
        if max(self.pass_at, default=1) > self.samples:
            raise ConfigurationError(f"pass_at={self.pass_at} needs as many answers, and samples={self.samples}.")
        if self.samples > 1 and self.sampling.greedy:
            raise ConfigurationError(
                f"samples={self.samples} greedy answers are all the same; give a sampling with a temperature."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutPlan(
    Part,
    limits={
        **dict.fromkeys(("samples_per_prompt", "max_new_tokens", "epochs", "minibatches", "rows_at_once"), Limit.COUNT),
        **dict.fromkeys(("resample_rounds", "max_staleness", "importance_cap"), Limit.NON_NEGATIVE),
        "reward_weights": Limit.FINITE,
    },
):
    """Plan of rollouts: sampling and scoring of completions, and the epochs over them.

    Args:
        samples_per_prompt: Completions of each prompt: the size of a group.
        max_new_tokens: Most tokens of a completion.
        sampling: Sampling settings. Only a temperature: the distribution that is trained is the one that was sampled.
        backend: Generator of the completions.
        epochs: Number of epochs over a rollout.
        minibatches: Optimizer steps that an epoch is cut into.
        mask_truncated: Do not train on truncated completions. They still count in its group's baseline.
        resample_rounds: Largest number of rounds in which zero-variance groups are replaced by new ones.
        max_staleness: Most optimizer steps from a completion to learning from it, and most by which the weights of a
            server may be older than the policy; more is refused. By default as many as a rollout makes necessary, and
            any number for a server (``rollout/sampler_staleness`` says how many).
        importance_cap: If given, a token counts as much more or less as the policy in training gives it more or less
            probability than the one that generated, up to this factor. For generation in another precision or engine,
            and needed where a server answers with older weights.
        reward_weights: One factor per reward; all 1 by default.
        scoring: Way of calling rewards.
        rows_at_once: Most completions that are generated, or scored, together. Changes no completion.
        validation: Validation on held-out prompts.
    """

    samples_per_prompt: int = 8
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    backend: Backend = OwnBackend()
    epochs: int = 1
    minibatches: int = 1
    mask_truncated: bool = False
    resample_rounds: int = 0
    max_staleness: int | None = None
    importance_cap: float | None = None
    reward_weights: tuple[float, ...] | None = None
    scoring: Scoring = Scoring()
    rows_at_once: int | None = None
    validation: Validation = Validation()

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = Sampling(temperature=self.sampling.temperature, seed=self.sampling.seed)
        if self.sampling.greedy or self.sampling != plain:
            raise ConfigurationError(
                f"{self.sampling} does not sample from the distribution that is trained, so its gradient would be "
                "wrong. Set only a temperature above 0; top_k, top_p, min_p and penalties must stay off."
            )
        self._check_backend()

    def _check_backend(self) -> None:
        push = self.backend.push
        lags = self.backend.has_own_weights and (push is None or push.every > self.steps)
        if lags and self.importance_cap is None:
            raise ConfigurationError(
                f"{type(self.backend).__name__} answers with weights that are older than the policy, which makes the "
                "gradient wrong. Let the server have the weights before every rollout (weights=WeightPush(...), with "
                f"every at most {self.steps}), or set importance_cap, such as 2.0, to correct for some of it."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps that a rollout lasts."""
        return self.epochs * self.minibatches


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Completions of this rank, all those of the first prompt before those of the second.

    Args:
        prompts: Prompts of the completions.
        samples: Completions of each prompt.
        completions: Sampled completions.
        values: Reward of each completion by each function, float64 [completions, rewards], NaN where it does not apply.
        totals: Weighted sums, float64 [completions]; NaN where no reward applies.
        names: Names of the rewards.
        failures: The completions that a reward failed on.
        num_right: Completions that are right by the first reward, before groups were replaced.
        num_scored: Completions to which it applies, before groups were replaced.
        resampled: Groups that were replaced.
        sampler_age: Optimizer steps by which the weights that answered are older than the policy.
    """

    prompts: PromptBatch
    samples: int
    completions: Sequence[Completion]
    values: np.ndarray
    totals: np.ndarray
    names: tuple[str, ...]
    failures: tuple[RewardFailure, ...] = ()
    num_right: int = 0
    num_scored: int = 0
    resampled: int = 0
    sampler_age: int = 0

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def groups(self) -> np.ndarray:
        """The totals, [prompts, samples]."""
        return self.totals.reshape(-1, self.samples)

    @property
    def zero_variance_groups(self) -> list[int]:
        """Indices of the groups without a learning signal: all rewards are equal, or none applies."""
        groups = self.groups
        known = ~np.isnan(groups)
        low, high = np.where(known, groups, np.inf).min(1), np.where(known, groups, -np.inf).max(1)
        return np.flatnonzero(low >= high).tolist()

    @property
    def truncated(self) -> np.ndarray:
        """Mask of the completions that hit the token limit."""
        return np.array([completion.finish_reason == "length" for completion in self.completions])

    def take(self, groups: Sequence[int]) -> "Rollout":
        """Return some groups."""
        rows = [group * self.samples + sample for group in groups for sample in range(self.samples)]
        return dataclasses.replace(
            self,
            prompts=take_prompts(self.prompts, groups),
            completions=[self.completions[row] for row in rows],
            values=self.values[rows],
            totals=self.totals[rows],
        )

    def require_rewards(self) -> None:
        """Refuse a rollout that cannot be trained on because of its rewards.

        Raises:
            RewardError: If a reward failed on every completion, or none applies to any.
        """
        for name in self.names:
            failures = [failure for failure in self.failures if failure.reward == name]
            if len(failures) >= len(self) > 0:
                raise RewardError(f"All {len(self)} completions of this rollout failed. {failures[0]}")
        if len(self) and np.isnan(self.totals).all():
            raise RewardError(
                f"No reward applies to any of the {len(self)} completions of this rollout ({', '.join(self.names)}). "
                f"The data has the columns {sorted(self.prompts['columns'])}; name the right one in the reward."
            )

    def rows(self, *, mask_truncated: bool, device: torch.device) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``labels``, int64 [completions, seq], padded on the right.

        Args:
            mask_truncated: Do not train on truncated completions.
            device: Device of the result.
        """
        lengths = [(len(answer.prompt_ids), len(answer.token_ids)) for answer in self.completions]
        ids = np.zeros((len(self), max(map(sum, lengths))), dtype=np.int64)
        labels = np.full_like(ids, IGNORE_INDEX)
        for row, (answer, (start, length)) in enumerate(zip(self.completions, lengths, strict=True)):
            ids[row, :start], ids[row, start : start + length] = answer.prompt_ids, answer.token_ids
            labels[row, start : start + length] = answer.token_ids
        labels[np.isnan(self.totals) | (self.truncated & mask_truncated)] = IGNORE_INDEX
        return {"input_ids": torch.from_numpy(ids).to(device), "labels": torch.from_numpy(labels).to(device)}

    def sampler_logprobs(self, like: Tensor) -> Tensor:
        """Return what the generator recorded, nats [completions, seq - 1]; 0 where there is no token.

        Args:
            like: Has the shape and the device.
        """
        values = np.zeros(like.shape, dtype=np.float32)
        for row, answer in enumerate(self.completions):
            start = len(answer.prompt_ids) - 1
            values[row, start : start + len(answer.token_ids)] = answer.logprobs or 0.0
        return torch.from_numpy(values).to(like.device)


@dataclasses.dataclass(frozen=True)
class RolloutEngine:
    """Generation and scoring of completions.

    Args:
        model: The policy.
        tokenizer: Tokenizer of the model; without one rewards see token ids only.
        rewards: Reward functions.
        plan: Plan of the rollouts.
        trainer: Trainer that knows the other ranks, the precision, and how to gather a sharded model.
    """

    model: nn.Module
    tokenizer: Tokenizer | None
    rewards: Sequence[Callable[..., Any]]
    plan: RolloutPlan
    trainer: Trainer

    def rollout(
        self, prompts: PromptBatch, seed_components: Sequence[int], spare: SparePrompts | None = None
    ) -> Rollout:
        """Complete prompts for training, and replace zero-variance groups as often as the plan says.

        Args:
            prompts: Prompts of this rank.
            seed_components: Numbers that the seed is derived from: seed of the run, step, micro-batch.
            spare: Source of new prompts; without it the same ones are completed again.
        """
        plan, key = self.plan, key_of("rollout", *seed_components, Ranks(self.trainer).rank)
        rollout = self.complete(prompts, plan.samples_per_prompt, dataclasses.replace(plan.sampling, seed=key))
        rollout.require_rewards()
        return self._resampled(rollout, prompts, key, spare) if plan.resample_rounds else rollout

    def _resampled(self, rollout: Rollout, prompts: PromptBatch, key: int, spare: SparePrompts | None) -> Rollout:
        """Replace zero-variance groups by others, as in DAPO's dynamic sampling, within the plan's number of rounds."""
        plan, samples = self.plan, rollout.samples
        for number in range(1, plan.resample_rounds + 1):
            without = rollout.zero_variance_groups
            wanted = Ranks(self.trainer).largest(len(without))  # ranks of a sharded model must generate equally much
            if not wanted:
                break
            places = (without + [group for group in range(len(rollout) // samples) if group not in without])[:wanted]
            again = take_prompts(prompts, places) if spare is None else spare(number, wanted)
            sampling = dataclasses.replace(plan.sampling, seed=key_of(key, number))
            rollout = _replace(rollout, without, self.complete(again, samples, sampling))
        return rollout

    def complete(self, prompts: PromptBatch, samples: int, sampling: Sampling, *, held_out: bool = False) -> Rollout:
        """Complete prompts and score the completions.

        Args:
            prompts: Prompts of this rank.
            samples: Completions of each.
            sampling: Sampling settings.
            held_out: Measure the policy itself, never the weights of a server.
        """
        plan, trainer = self.plan, self.trainer
        for reward in self.rewards:
            check_reward(reward, prompts["columns"])
        backend = OwnBackend() if held_out and plan.backend.has_own_weights else plan.backend
        agree = (lambda unfinished: go_on_together(Ranks(trainer), unfinished)) if trainer.world_size > 1 else None
        generator = backend.build(PolicyAtWork(self.model, self.tokenizer, plan.rows_at_once, agree))
        # Where ranks agree on every token they stop together; no other sampling has collective operations.
        section = nullcontext() if agree and not backend.has_own_weights else interruptible(trainer)
        with section, whole_model(trainer), trainer.precision_plugin.forward_context():
            completions = generator.generate(
                [ids.tolist() for ids in prompts["prompt_ids"]],
                sampling=sampling,
                max_new_tokens=plan.max_new_tokens,
                stop_ids=prompts["stop_ids"],
                num_samples=samples,
                logprobs=not sampling.greedy,
            )
        with interruptible(trainer):
            table = self._score(prompts, completions, samples)
        columns = (table.values, table.totals, table.names, table.failures)
        num_right = int((table.values[:, 0] >= plan.validation.threshold).sum())
        num_scored = int((~np.isnan(table.values[:, 0])).sum())
        return Rollout(prompts, samples, completions, *columns, num_right, num_scored)

    def _score(self, prompts: PromptBatch, completions: Sequence[Completion], samples: int) -> RewardTable:
        columns = {name: _repeated(column, samples) for name, column in prompts["columns"].items()}
        table = score(
            self.rewards,
            self.plan.reward_weights or [1.0] * len(self.rewards),
            prompts=_repeated(prompts["prompts"], samples),
            completions=[completion.text for completion in completions],
            columns={**columns, "completion_ids": [list(completion.token_ids) for completion in completions]},
            scoring=self.plan.scoring,
        )
        if table.failures:
            more = len(table.failures) - 1
            rank_zero_warn(f"{table.failures[0]}{f' ({more} more of this kind)' if more else ''}")
        return table


class ServerWeights:
    """Keeps account of the weights that a server has.

    Args:
        plan: Names the backend, and how old its weights may be.
    """

    def __init__(self, plan: RolloutPlan) -> None:
        self._plan = plan
        self._step: int | None = None

    def update(self, model: nn.Module, tokenizer: Tokenizer | None, trainer: Trainer) -> int:
        """Give the server the policy's weights if it is time, on every rank; return the age of those that will answer.

        Args:
            model: The policy.
            tokenizer: That of the policy.
            trainer: Trainer that knows the step and the other ranks.

        Returns:
            Optimizer steps from the server's weights to the policy's; the server begins with those of step 0.

        Raises:
            ConfigurationError: If they are older than the plan allows.
            RemoteError: If the server does not take them.
        """
        plan, step = self._plan, trainer.global_step
        push = plan.backend.push
        if push is not None and (self._step is None or step - self._step >= push.every):
            with whole_model(trainer):
                if trainer.is_global_zero:
                    push(model, tokenizer)
            trainer.strategy.barrier()
            self._step = step
        age = step - (self._step or 0)
        if plan.max_staleness is not None and age > plan.max_staleness:
            raise ConfigurationError(
                f"The server's weights are {age} optimizer steps old, and max_staleness={plan.max_staleness}. Push "
                "them more often (WeightPush(every=...)), or raise max_staleness."
            )
        return age


def _replace(rollout: Rollout, without_signal: Sequence[int], fresh: Rollout) -> Rollout:
    """Replace zero-variance groups by groups of a fresh rollout that have a learning signal."""
    groups, samples = len(rollout) // rollout.samples, rollout.samples
    useful = [group for group in range(len(fresh) // samples) if group not in fresh.zero_variance_groups]
    replaced = dict(zip(without_signal, useful, strict=False))
    both = dataclasses.replace(
        rollout,
        prompts=join_prompts(rollout.prompts, fresh.prompts),
        completions=[*rollout.completions, *fresh.completions],
        values=np.concatenate([rollout.values, fresh.values]),
        totals=np.concatenate([rollout.totals, fresh.totals]),
        resampled=rollout.resampled + len(replaced),
    )
    return both.take([groups + replaced[group] if group in replaced else group for group in range(groups)])


def _repeated(values: Sequence[Any], times: int) -> list[Any]:
    return [value for value in values for _ in range(times)]

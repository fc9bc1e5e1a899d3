"""Experience for the optimizer: each rollout is divided into the micro-batches of its optimizer steps.

The objective's ratio compares the policy with the one before the updates of a rollout (``old_logprobs``). The first
optimizer step after a rollout computes these log-probabilities itself, which saves a forward pass:

1. `policy_logprobs`, while a rollout is made, computes those of all rows but the first step's, which are NaN;
2. `ExperienceLoader` drops ``old_logprobs`` from the first step's micro-batches;
3. `with_old_logprobs`, once the loss has computed the current ones, takes these in their place; and
4. writes them into the rollout if later epochs train on the same rows again.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_lm.data.post_training.prompts import PromptBatch
from lightning_lm.errors import ConfigurationError
from lightning_lm.modules.rl.rollout import Rollout, RolloutPlan, SparePrompts
from lightning_lm.modules.token_losses import target_mask

__all__ = [
    "Experience",
    "ExperienceLoader",
    "PromptSource",
    "describe_rollout",
    "epoch_orders",
    "policy_logprobs",
    "recorded_logprobs",
    "resume_after_rollout",
    "skip_unfinished_rollout",
    "staleness_of",
    "with_old_logprobs",
]

Experience = dict[str, Any]
"""A `types.ExperienceBatch`."""
Collect = Callable[[PromptBatch, SparePrompts | None], Experience]


class PromptSource(Protocol):
    """Batches of prompts for this rank, one for each rollout. It may have ``spare``, a `SparePrompts`."""

    prompts_per_batch: int
    """Prompts of a batch, always the same."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[PromptBatch]: ...


class ExperienceLoader:
    """Loader of micro-batches of experience: collects a rollout from the current policy whenever one is needed.

    Each batch of prompts gives one rollout, each rollout ``epochs * minibatches`` optimizer steps of
    ``accumulate_grad_batches`` micro-batches. It has a length, so that Lightning fetches nothing ahead of the step:
    prefetched experience would be one update old.

    Args:
        collect: Makes a rollout: a whole step's rows of this rank.
        prompts: Source of prompts.
        plan: Number of epochs over a rollout.
        trainer: Trainer that knows how many micro-batches make a step.

    Raises:
        ConfigurationError: If the completions cannot be cut into as many micro-batches.
    """

    def __init__(self, collect: Collect, prompts: PromptSource, plan: RolloutPlan, trainer: Trainer) -> None:
        self._collect, self._prompts, self._plan, self._trainer = collect, prompts, plan, trainer
        self._micro_batches = trainer.accumulate_grad_batches
        rows, parts = prompts.prompts_per_batch * plan.samples_per_prompt, plan.minibatches * self._micro_batches
        if rows % parts:
            raise ConfigurationError(
                f"A rank's {prompts.prompts_per_batch} prompts x samples_per_prompt={plan.samples_per_prompt} give "
                f"{rows} answers, which cannot be cut into minibatches={plan.minibatches} x accumulate_grad_batches="
                f"{self._micro_batches} = {parts} equal parts. Change one of these numbers."
            )

    @property
    def batches_per_rollout(self) -> int:
        """Micro-batches that a rollout gives."""
        return self._plan.steps * self._micro_batches

    def __len__(self) -> int:
        """Return the number of micro-batches of an epoch."""
        return len(self._prompts) * self.batches_per_rollout

    def __iter__(self) -> Iterator[Experience]:
        for prompts in self._prompts:
            if self._trainer.accumulate_grad_batches != self._micro_batches:
                raise ConfigurationError(
                    f"accumulate_grad_batches changed from {self._micro_batches} to "
                    f"{self._trainer.accumulate_grad_batches} while training, but rollouts are cut to fit it. Remove "
                    "the callback that changes it (GradientAccumulationScheduler)."
                )
            rows = self._collect(prompts, getattr(self._prompts, "spare", None))
            yield from _cut(rows, self._plan, self._micro_batches)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the datamodule knows the position. Lightning sees by it that training can be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the datamodule has restored the position."""


def epoch_orders(rows: Experience, plan: RolloutPlan) -> list[Tensor]:
    """Return the row indices of a rollout in the order of each epoch, int64 [rows].

    Args:
        rows: The rollout.
        plan: Number of epochs over a rollout.
    """
    labels, generator = rows["labels"], torch.Generator().manual_seed(rows["policy_version"])
    return [torch.randperm(len(labels), generator=generator).to(labels.device) for _ in range(plan.epochs)]


def _cut(rows: Experience, plan: RolloutPlan, micro_batches: int) -> Iterator[Experience]:
    for epoch, order in enumerate(epoch_orders(rows, plan)):
        parts = plan.minibatches * micro_batches
        for number, part in enumerate(order.chunk(parts)):
            taken = {name: value[part] if _has_rows(value) else value for name, value in rows.items()}
            num_fresh = taken.pop("num_fresh", 0)
            if epoch == 0 and number * len(order) < num_fresh * parts:
                del taken["old_logprobs"]
                taken |= {"row_ids": part} if plan.epochs > 1 else {}
            yield _trim(taken)


def policy_logprobs(
    rows: Experience, plan: RolloutPlan, logprobs: Callable[[Tensor], Tensor], *, all_rows: bool
) -> Experience:
    """Return ``old_logprobs``, nats [rows, seq - 1], and ``num_fresh``: how many rows the first step will compute.

    Args:
        rows: The rollout.
        plan: Division of the rollout into optimizer steps.
        logprobs: Computes the log-probabilities of some rows, given their indices.
        all_rows: Compute those of the first step too.
    """
    mask, order = target_mask(rows), epoch_orders(rows, plan)[0]
    num_fresh = 0 if all_rows else len(order) // plan.minibatches
    scored = order[num_fresh:].sort().values
    old = torch.full(mask.shape, torch.nan, device=mask.device)
    if len(scored):
        old[scored] = logprobs(scored)
    return {"old_logprobs": old, "num_fresh": num_fresh}


def recorded_logprobs(rollout: Rollout, rows: Experience) -> Experience:
    """Return the sampler's log-probabilities, nats [rows, seq - 1].

    Args:
        rollout: Rollout that records them.
        rows: The rollout's rows.

    Raises:
        ConfigurationError: If generation gave none.
    """
    if any(answer.logprobs is None for answer in rollout.completions):
        raise ConfigurationError(
            "ratio_to='sampler' needs the log-probabilities of sampled tokens, and this generation gives none. Use "
            "ratio_to='policy'."
        )
    return {"old_logprobs": rollout.sampler_logprobs(target_mask(rows).float())}


def with_old_logprobs(batch: Mapping[str, Any], logprobs: Tensor, rollout: Experience | None) -> Mapping[str, Any]:
    """Return a micro-batch with ``old_logprobs``: in the first step of a rollout the current log-probabilities.

    Args:
        batch: Experience. Its ``row_ids``, if any, are rows of the rollout that later epochs train on again.
        logprobs: Log-probabilities by the current policy, nats [rows, seq - 1].
        rollout: The rollout, whose ``old_logprobs`` are filled in place.
    """
    if "old_logprobs" in batch:
        return batch
    old = logprobs.detach()
    if "row_ids" in batch and rollout is not None:  # columns after the micro-batch's last one have no target tokens
        rollout["old_logprobs"][batch["row_ids"], : old.shape[1]] = old.float()
    return {**batch, "old_logprobs": old}


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _trim(rows: Experience) -> Experience:
    """Trim the columns after the last target token; they change nothing."""
    width = rows["labels"].shape[1]
    columns = target_mask(rows).any(0).nonzero()
    kept = int(columns[-1]) + 2 if len(columns) else 2
    return {
        name: value[:, : kept - (width - value.shape[1])] if _has_rows(value) and value.dim() == 2 else value
        for name, value in rows.items()
    }


def staleness_of(batch: Mapping[str, Any], plan: RolloutPlan, step: int) -> int:
    """Return by how many optimizer steps experience is older than the policy.

    Args:
        batch: Experience.
        plan: Largest age of a rollout.
        step: Optimizer steps that the policy has taken.

    Raises:
        ConfigurationError: If it is older than the plan allows.
    """
    staleness: int = step - batch.get("policy_version", step)
    limit = plan.steps - 1 if plan.max_staleness is None else plan.max_staleness
    # Without them this step computes those of the policy that sampled.
    limit = limit if "old_logprobs" in batch else 0
    if staleness > limit:
        raise ConfigurationError(
            f"Experience is {staleness} optimizer steps old, and the plan allows {limit}. A loader without a "
            "length makes Lightning fetch ahead; give it one, or raise max_staleness."
        )
    return staleness


# --- checkpoints that are written within a rollout: a run resumes after it, with a rollout of its own ---


def describe_rollout(steps: int, trainer: Trainer) -> dict[str, int]:
    """Return what tells later whether a rollout was finished when a checkpoint was written.

    Args:
        steps: Optimizer steps that a rollout lasts.
        trainer: The one that trains.
    """
    return {
        "steps": steps,
        "micro_batches": trainer.accumulate_grad_batches,
        "batches_per_epoch": int(trainer.num_training_batches),
    }


def resume_after_rollout(fit_loop: dict[str, Any], was: Mapping[str, int], steps: int, trainer: Trainer) -> None:
    """Let a run go on with a rollout of its own, in place.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``.
        was: Result of `describe_rollout` when the checkpoint was written.
        steps: Optimizer steps that a rollout lasts now.
        trainer: The one that goes on.
    """
    skip_unfinished_rollout(
        fit_loop,
        was={
            "batches_per_rollout": was["steps"] * was["micro_batches"],
            "batches_per_epoch": was["batches_per_epoch"],
        },
        now=(steps if was["steps"] > 1 else 1) * trainer.accumulate_grad_batches,
    )


def skip_unfinished_rollout(fit_loop: dict[str, Any], *, was: Mapping[str, int], now: int) -> None:
    """Let a checkpoint that was written within a rollout resume after it, in place, and say so.

    The rest of such a rollout cannot be had again: it was sampled from a policy that is no more.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``.
        was: ``batches_per_rollout`` and ``batches_per_epoch`` of the run that wrote the checkpoint.
        now: ``batches_per_rollout`` of this run.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    current, per_rollout = progress["current"], was["batches_per_rollout"]
    rollouts = -(-current["ready"] // per_rollout)
    left = rollouts * per_rollout - current["processed"]
    if left:
        rank_zero_warn(
            f"The checkpoint was written within a rollout; its last {left} of {per_rollout} micro-batches are dropped. "
            "Training goes on with the next prompts."
        )
        progress["is_last_batch"] = rollouts * per_rollout >= was["batches_per_epoch"]
    elif now == per_rollout:
        return
    ends_in_hook, shift = current["processed"] - current["completed"], rollouts * now - current["ready"]
    for counts in (current, progress["total"]):
        ready = counts["ready"] + shift
        counts.update(ready=ready, started=ready, processed=ready, completed=ready - ends_in_hook)

"""Checkpoints that are written within a rollout: a run goes on behind it, with a rollout of its own."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["describe_rollout", "resume_behind_rollout", "skip_unfinished_rollout"]


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


def resume_behind_rollout(fit_loop: dict[str, Any], was: Mapping[str, int], steps: int, trainer: Trainer) -> None:
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
    """Let a checkpoint that was written within a rollout go on behind it, in place, and say so.

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

"""The verifiable instructions of IFEval, by kind; the task is `lightning_lm.evals.tasks.IFEval`."""

from lightning_lm.evals.ifeval.instructions import INSTRUCTIONS, follows

__all__ = ["INSTRUCTIONS", "follows"]

"""Reasoning before the answer: chain of thought, and budget forcing, as parts of a task that is answered by text.

A model first writes its reasoning, behind a cue (Kojima et al. 2022, arXiv:2205.11916), and then the answer behind
another one. With a budget (Muennighoff et al. 2025, arXiv:2501.19393) reasoning is cut after a number of tokens, and a
model that would stop earlier is told to go on.
"""

import dataclasses
from typing import ClassVar

from lightning_lm.parts import Limit, Part

__all__ = ["BudgetForcing", "ChainOfThought"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainOfThought(Part, limits={"max_tokens": Limit.COUNT}):
    """Reasoning first, then the answer.

    Args:
        cue: Text after the question, with which reasoning begins.
        answer: Text after the reasoning, with which the answer begins; by default the task's own.
        end: Texts that end the reasoning, besides those that the task stops at.
        max_tokens: Most tokens of the reasoning; then it is cut and the answer asked for.
    """

    cue: str = " Let's think step by step."
    answer: str | None = None
    end: tuple[str, ...] = ("</think>",)
    max_tokens: int = 512

    waits: ClassVar[int] = 0
    wait: ClassVar[str] = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetForcing(ChainOfThought, limits={"waits": Limit.NON_NEGATIVE}):
    """Reasoning of a set length: cut at ``max_tokens``, and lengthened where a model would stop before.

    Args:
        waits: Number of times that a model which stops before the budget is spent is told to go on.
        wait: Text that tells it to.
    """

    waits: int = 1  # type: ignore[misc]
    wait: str = "\nWait,"  # type: ignore[misc]

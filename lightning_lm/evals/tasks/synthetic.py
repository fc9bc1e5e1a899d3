"""Tasks made of numbers, the same on every machine: they need no download."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import ClassVar

from lightning_lm.data import ReverseDigits
from lightning_lm.data.records import Place, Placed
from lightning_lm.errors import ConfigurationError
from lightning_lm.evals.tasks.few_shot import FirstShots, Shots
from lightning_lm.evals.tasks.generation_task import GenerationTask
from lightning_lm.evals.tasks.verdicts import AnswerCheck, Check
from lightning_lm.parts import Limit
from lightning_lm.rewards import AnswerPattern

__all__ = ["Arithmetic", "Reverse"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reverse(GenerationTask, limits={"num_items": Limit.COUNT, "num_digits": Limit.COUNT}):
    """Numbers to reverse, ``31415=``: the held-out ones of `lightning_lm.data.ReverseDigits`.

    Args:
        num_items: Number of questions.
        num_digits: Digits of a number.
    """

    name: str = "reverse"
    question: str = "{{ prompt }}"
    delimiter: str = ""
    separator: str = "\n"
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 8
    num_items: int = 200
    num_digits: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens <= self.num_digits:
            raise ConfigurationError(
                f"max_new_tokens={self.max_new_tokens} may not be enough for num_digits={self.num_digits} and the end; "
                f"set max_new_tokens={self.num_digits + 2}."
            )

    def records(self, split: str) -> Iterator[Placed]:
        """Yield the numbers of a split, each once."""
        source = ReverseDigits(num_examples=4 * self.num_items, num_digits=self.num_digits, held_out=split != "train")
        distinct = {record["prompt"]: record for record in source.records()}
        if len(distinct) < self.num_items:
            raise ConfigurationError(
                f"num_items={self.num_items} is more than the {len(distinct)} numbers of {self.num_digits} digits that "
                "were drawn; ask for fewer, or for more digits."
            )
        for number, record in enumerate(list(distinct.values())[: self.num_items]):
            yield Placed(Place("reverse", f"number {number}"), record)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic(GenerationTask, limits={"num_items": Limit.COUNT}):
    """Sums, differences and products of two numbers of one to three digits, with three examples.

    Subjects are the operations by the digits: ``2-digit +``.

    Args:
        num_items: Number of questions.
    """

    name: str = "arithmetic"
    question: str = "{{ left }} {{ operation }} {{ right }} ="
    separator: str = "\n"
    subject: str = "subject"
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 12
    checks: Mapping[str, Check] = dataclasses.field(
        default_factory=lambda: {"exact_match": AnswerCheck(extract=(AnswerPattern(pattern=r"^\s*(-?\d+)"),))}
    )
    shots: Shots = FirstShots(num=3)
    num_items: int = 300

    operations: ClassVar[tuple[str, ...]] = ("+", "-", "*")

    def records(self, split: str) -> Iterator[Placed]:
        """Yield the questions of a split, each once; a question belongs to one split alone."""
        seen: set[tuple[int, str, int]] = set()
        number = 0
        while len(seen) < self.num_items:
            digits, operation = 1 + number % 3, self.operations[number // 3 % 3]
            left, right = (_draw(number, place) for place in range(2))
            left, right = left % 10**digits, right % 10**digits
            number += 1
            question = (left, operation, right)
            if question in seen or (_draw(left * 1000 + right, operation) % 10 == 0) is not (split == "train"):
                continue
            seen.add(question)
            value = {"+": left + right, "-": left - right, "*": left * right}[operation]
            fields = {"left": left, "operation": operation, "right": right, "answer": str(value)}
            yield Placed(Place("arithmetic", f"draw {number}"), {**fields, "subject": f"{digits}-digit {operation}"})


def _draw(number: int, place: int | str) -> int:
    """Return a number from 0 to 2^32 - 1, the same on every machine and version."""
    return int.from_bytes(hashlib.sha256(f"{number}:{place}".encode()).digest()[:4], "big")

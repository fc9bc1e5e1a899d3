"""A small task with a known answer, on which every post-training objective shows its effect within a minute.

Reverse a number: the completion of ``31415=`` is ``51413``. Demonstrations are mostly wrong on purpose (a plain copy),
so that SFT learns the format and both behaviours, and only a reward separates them.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_lm.data.post_training.examples import ExampleSource, Record
from lightning_lm.errors import ConfigurationError

__all__ = ["ReverseDigits"]

_HELD_OUT_SEED = 2**32


@dataclass(frozen=True, kw_only=True)
class ReverseDigits(ExampleSource):
    """Numbers to reverse, each with a demonstration, a chosen and a rejected completion, and the right answer.

    Fields: ``prompt``, ``completion`` (the demonstration), ``answer``, ``chosen``, ``rejected``. The held-out numbers
    are the same whatever the seed, and never among the others.

    Args:
        num_examples: Records.
        num_digits: Digits of a number.
        wrong_share: Fraction of the demonstrations that copy the number instead of reversing it.
        rejected: The rejected completion: the ``copy``, or the right one with one digit changed (``corrupted``).
        held_out: Give held-out numbers.
        seed: Seed of the numbers.
    """

    num_examples: int = 20_000
    num_digits: int = 5
    wrong_share: float = 0.6
    rejected: Literal["copy", "corrupted"] = "copy"
    held_out: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ConfigurationError(f"num_examples={self.num_examples} must be at least 1.")
        if not 0 <= self.wrong_share <= 1:
            raise ConfigurationError(f"wrong_share={self.wrong_share} must be from 0 to 1.")
        if self.num_digits < 2:
            raise ConfigurationError(f"num_digits={self.num_digits} leaves nothing to reverse; use at least 2.")

    def records(self) -> Iterator[Record]:
        """Yield the records."""
        generator = random.Random(_HELD_OUT_SEED if self.held_out else self.seed)
        given = 0
        while given < self.num_examples:
            number = "".join(generator.choices("0123456789", k=self.num_digits))
            is_held_out = _is_held_out(number)
            if number == number[::-1] or is_held_out != self.held_out:
                continue
            given += 1
            yield self._record(number, generator)

    def _record(self, number: str, generator: random.Random) -> Record:
        answer = number[::-1]
        wrong = generator.random() < self.wrong_share
        return {
            "prompt": f"{number}=",
            "completion": number if wrong else answer,
            "answer": answer,
            "chosen": answer,
            "rejected": number if self.rejected == "copy" else _corrupted(answer, generator),
        }


def _is_held_out(number: str) -> bool:
    """Tell whether a number is one of the tenth that is never trained on."""
    return random.Random(number).random() < 0.1


def _corrupted(answer: str, generator: random.Random) -> str:
    place = generator.randrange(len(answer))
    digit = str((int(answer[place]) + generator.randrange(1, 10)) % 10)
    return answer[:place] + digit + answer[place + 1 :]

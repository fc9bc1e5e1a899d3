"""Ways to tell whether a completion is right: its answer compared with the right ones, or a reward."""

import abc
import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.parts import Limit, Part
from lightning_lm.rewards import AnswerExtractor, Reward, same_answer

__all__ = ["AnswerCheck", "Check", "RewardCheck", "SameAnswer", "SameText", "SameValue", "Verdict"]


class Verdict(NamedTuple):
    """Judgement of a completion."""

    value: float
    """1 if it is right, 0 if it is wrong."""
    answer: str | None
    """Its answer, in a form in which equal answers are equal; ``None`` if it has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SameAnswer(Part):
    """Base of the comparisons of two answers."""

    @abc.abstractmethod
    def __call__(self, given: str, right: str) -> bool:
        """Return whether two answers are the same.

        Args:
            given: Answer of a completion.
            right: The right answer.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class SameText(SameAnswer):
    """Compares texts without surrounding white space.

    Args:
        ignore_case: Compare in lower case.
        ignore_punctuation: Take out ASCII punctuation first.
        ignored: Regular expressions whose matches are taken out first.
    """

    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in self.ignored:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigurationError(f"ignored={pattern!r} is no regular expression: {error}.") from error

    def __call__(self, given: str, right: str) -> bool:
        """Return whether the texts are equal."""
        return self._plain(given) == self._plain(right)

    def _plain(self, text: str) -> str:
        for pattern in self.ignored:
            text = re.sub(pattern, "", text)
        text = text.lower() if self.ignore_case else text
        return (text.translate(_NO_PUNCTUATION) if self.ignore_punctuation else text).strip()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SameValue(SameAnswer, limits={"time_s": Limit.POSITIVE}):
    """Compares mathematical answers by value: see `lightning_lm.rewards.same_answer`.

    Args:
        time_s: Longest time of one comparison. Seconds.
    """

    time_s: float = 5.0

    def __call__(self, given: str, right: str) -> bool:
        """Return whether the answers have the same value."""
        return same_answer(given, right, time_s=self.time_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(Part):
    """Base of the ways to tell whether completions are right."""

    has_answers: ClassVar[bool] = False
    """True if completions have answers that can be voted on."""

    @abc.abstractmethod
    def __call__(self, completions: Sequence[str], gold: Any, prompt: str) -> list[Verdict]:
        """Return the verdict on each completion.

        Args:
            completions: Completions of one prompt.
            gold: The item's reference.
            prompt: The prompt as text.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerCheck(Check):
    """Right if the extracted answer is one of the right ones.

    Args:
        extract: Ways to find the answer; the first that finds one decides. By default the whole text is the answer.
        same: Comparison of answers.
    """

    extract: tuple[AnswerExtractor, ...] = ()
    same: SameAnswer = SameText()

    has_answers: ClassVar[bool] = True

    def __call__(self, completions: Sequence[str], gold: Any, prompt: str) -> list[Verdict]:  # noqa: ARG002
        """Compare each answer; answers that are the same get the same spelling, that of the first."""
        right = [str(each) for each in gold] if isinstance(gold, list | tuple) else [str(gold)]
        known: dict[str, Verdict] = {}
        return [self._verdict(self.given(text), right, known) for text in completions]

    def given(self, text: str) -> str | None:
        """Return the answer of a completion, or ``None`` if there is none.

        Args:
            text: The completion.
        """
        if not self.extract:
            return text.strip() or None
        return next((found for find in self.extract if (found := find(text)) is not None), None)

    def _verdict(self, answer: str | None, right: Sequence[str], known: dict[str, Verdict]) -> Verdict:
        if answer is None:
            return Verdict(0.0, None)
        if answer not in known:
            alike = next((verdict for other, verdict in known.items() if self.same(answer, other)), None)
            is_right = any(self.same(answer, each) for each in right)
            known[answer] = (
                alike if alike is not None and bool(alike.value) is is_right else Verdict(float(is_right), answer)
            )
        return known[answer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardCheck(Check):
    """Right as far as a reward says so; completions have no answers that could be voted on.

    Args:
        reward: A reward of `lightning_lm.rewards`, such as ``CodeTests``.
        column: Name of the column of the reference, as the reward expects it.
    """

    reward: Reward = dataclasses.field(kw_only=False)
    column: str = "answer"

    def __call__(self, completions: Sequence[str], gold: Any, prompt: str) -> list[Verdict]:
        """Score the completions."""
        columns: Mapping[str, Any] = {self.column: [gold] * len(completions)}
        values = self.reward(prompts=[prompt] * len(completions), completions=completions, **columns)
        if any(value is None for value in values):
            raise DataError(f"{type(self.reward).__name__} does not apply: the item has no {self.column!r}.")
        return [Verdict(float(value or 0.0), None) for value in values]

r"""Rewards for answers that can be checked: exact text, and mathematics by value rather than by spelling."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from lightning_lm.parts import Limit, Part
from lightning_lm.rewards.answer_workers import compare_in_worker
from lightning_lm.rewards.comparison import quick_verdict
from lightning_lm.rewards.extractors import AfterHashes, AnswerExtractor, AnswerPhrase, Boxed, LastNumber, OptionLetter
from lightning_lm.rewards.notation import as_number, read_answer

__all__ = ["ExactAnswer", "MathAnswer", "Reward", "same_answer"]

_LONGEST = 1000
"""Characters. A longer answer is not compared by value."""
_ONE_NUMBER = re.compile(r"[A-Za-z ,.:;'()*$]*")


@dataclass(frozen=True, kw_only=True)
class Reward(Part):
    """Base of the rewards: call it with the samples' columns, it returns one number per sample, or ``None``.

    ``None`` means that the reward does not apply to that sample. Any function of the same form can be used too.
    """

    limits_itself: ClassVar[bool] = False
    """True if the reward bounds the time of each sample, so that ``Scoring.timeout_s`` is not applied to a batch."""

    @abstractmethod
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        """Return the reward of each sample."""


@dataclass(frozen=True, kw_only=True)
class ExactAnswer(Reward):
    """1 if the completion, stripped of surrounding whitespace, is the sample's answer, else 0.

    Args:
        column: Name of the column with the answer.
    """

    column: str = "answer"

    @override
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        """Compare each completion with its answer; ``None`` where a sample has no answer."""
        answers = columns.get(self.column) or [None] * len(completions)
        return [
            None if answer is None else float(completion.strip() == str(answer).strip())
            for completion, answer in zip(completions, answers, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class MathAnswer(Reward, limits={"time_s": Limit.POSITIVE, "workers": Limit.COUNT}):
    """1 if the completion's final answer has the value of the sample's answer, else 0.

    Numbers and words are compared at once. Expressions, sets, equations and matrices are compared with sympy, and with
    `math-verify <https://github.com/huggingface/Math-Verify>`_ if one of them cannot be read here, in a process that is
    ended when a comparison takes longer than ``time_s``.

    Args:
        extractors: Ways to find the final answer; the first that finds one decides. By default: after ``####``, boxed,
            the formula after "the answer is", the last number; and instead of the last number the option letter, if
            the right answer is a single letter from A to J.
        column: The column with the right answer, or a whole solution in one of the same forms.
        time_s: Longest time of one comparison; a longer one gives 0. Seconds.
        workers: Number of comparisons that run at the same time.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    extractors: tuple[AnswerExtractor, ...] | None = None
    column: str = "answer"
    time_s: float = 5.0
    workers: int = 2

    limits_itself: ClassVar[bool] = True

    @override
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        """Compare each final answer with the right one; ``None`` if a sample has no answer."""
        answers = columns.get(self.column) or [None] * len(completions)
        pairs = [
            None if answer is None else self._pair(completion, str(answer))
            for completion, answer in zip(completions, answers, strict=True)
        ]
        distinct = list({pair: None for pair in pairs if pair is not None})
        with ThreadPoolExecutor(self.workers) as pool:
            verdicts = dict(zip(distinct, pool.map(self._is_right, distinct), strict=True))
        return [None if pair is None else float(verdicts[pair]) for pair in pairs]

    def _pair(self, completion: str, answer: str) -> tuple[str | None, str]:
        """Return the answer that was given and the right one."""
        # A right answer of another form, such as "x + 1", is taken as it stands, not for the number it ends with.
        right = _first(self.extractors or (AfterHashes(), Boxed()), answer, skip=LastNumber) or answer
        option = re.fullmatch(r"[A-J]", read_answer(right).text) is not None
        last = OptionLetter() if option else LastNumber()
        given = _first(self.extractors or (AfterHashes(), Boxed(), AnswerPhrase(), last), completion)
        if given is None or self.extractors is not None:
            return given, right
        if option:
            return OptionLetter()(given) or given, right
        return _single_number(given) if as_number(read_answer(right).text) else given, right

    def _is_right(self, pair: tuple[str | None, str]) -> bool:
        given, right = pair
        return given is not None and same_answer(given, right, time_s=self.time_s)


def _first(ways: Sequence[AnswerExtractor], text: str, skip: type[AnswerExtractor] | tuple[()] = ()) -> str | None:
    return next((found for find in ways if not isinstance(find, skip) and (found := find(text)) is not None), None)


def _single_number(given: str) -> str:
    """Return the number of an answer that is a sentence with one number: ``#### The total is 18 dollars``."""
    numbers = LastNumber().all(given)
    around = given.replace(numbers[0], "", 1) if len(numbers) == 1 else "0"
    is_value = as_number(read_answer(given).text) is not None
    return numbers[0] if not is_value and _ONE_NUMBER.fullmatch(around) else given


def same_answer(given: str, right: str, *, time_s: float = 5.0) -> bool:
    r"""Return whether two answers have the same value, however they are written.

    Compares texts, numbers (``1,000``, ``$5``, ``50%``) and words at once; expressions, lists, sets, intervals,
    equations and matrices with sympy and math-verify in another process. A unit counts only if both answers have one.
    Lists without brackets and sets have no order, tuples have one.

    Args:
        given: Answer to score.
        right: The right answer.
        time_s: Longest time of the comparison in the other process; a longer one is a "no". Seconds.

    Example:
        >>> same_answer(r"\frac{\sqrt{8}}{2}", "2^{1/2}")
        True
    """
    if len(given) > _LONGEST or len(right) > _LONGEST:
        return given.strip() == right.strip()
    verdict = quick_verdict(given, right)
    return compare_in_worker(given, right, time_s=time_s) if verdict is None else verdict

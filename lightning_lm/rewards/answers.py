r"""Rewards for answers that can be checked: exact text, and mathematics by value rather than by spelling."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from typing_extensions import override

from lightning_lm.parts import Part
from lightning_lm.rewards.expressions import same_value

__all__ = [
    "AfterHashes",
    "AnswerExtractor",
    "Boxed",
    "ExactAnswer",
    "LastNumber",
    "MathAnswer",
    "Reward",
    "same_answer",
]

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?\.?\d+")


@dataclass(frozen=True, kw_only=True)
class Reward(Part):
    """Base of the rewards: call it with the samples' columns, it returns one number per sample, or ``None``.

    ``None`` means that the reward has nothing to say about that sample. Any function of the same form can be used too.
    """

    @abstractmethod
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        """Return the reward of each sample."""


@dataclass(frozen=True, kw_only=True)
class ExactAnswer(Reward):
    """1 where the completion, without blanks around it, is the sample's answer, else 0.

    Args:
        column: The column that holds the answer.
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
class AnswerExtractor(Part):
    """Base of the ways to find the final answer in a solution."""

    @abstractmethod
    def __call__(self, text: str) -> str | None:
        """Return the answer, or ``None`` where there is none."""


@dataclass(frozen=True, kw_only=True)
class AfterHashes(AnswerExtractor):
    """What follows the last ``####``, to the end of that line: the form of GSM8K."""

    def __call__(self, text: str) -> str | None:
        """Return the rest of the line after the last ``####``."""
        _, hashes, rest = text.rpartition("####")
        return rest.strip().partition("\n")[0].strip() or None if hashes else None


@dataclass(frozen=True, kw_only=True)
class Boxed(AnswerExtractor):
    r"""What the last ``\boxed{...}`` holds, braces inside it included: the form of MATH."""

    def __call__(self, text: str) -> str | None:
        r"""Return the content of the last complete ``\boxed{...}``."""
        starts = [match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]
        for start in reversed(starts):
            depth = 1
            for end in range(start, len(text)):
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                if depth == 0:
                    return text[start:end].strip()
        return None


@dataclass(frozen=True, kw_only=True)
class LastNumber(AnswerExtractor):
    """The last number of the text, with its sign, thousands separators and decimals."""

    def __call__(self, text: str) -> str | None:
        """Return the last number as it is written."""
        numbers = _NUMBER.findall(text)
        return numbers[-1] if numbers else None


@dataclass(frozen=True, kw_only=True)
class MathAnswer(Reward):
    """1 where the completion's final answer has the value of the sample's answer, else 0.

    Args:
        extractors: Ways to find the final answer; the first that finds one decides. Left out: after ``####``, boxed,
            the last number.
        column: The column that holds the right answer, or a whole solution in one of the same forms.
    """

    extractors: tuple[AnswerExtractor, ...] | None = None
    column: str = "answer"

    @override
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        """Compare each final answer with the right one; ``None`` where a sample has no answer."""
        answers = columns.get(self.column) or [None] * len(completions)
        return [
            None if answer is None else float(self._is_right(completion, str(answer)))
            for completion, answer in zip(completions, answers, strict=True)
        ]

    def _is_right(self, completion: str, answer: str) -> bool:
        given = self._extract(completion)
        # A right answer of another form, such as "x + 1", is taken as it stands, not for the number it ends with.
        explicit = [find for find in self._ways if not isinstance(find, LastNumber)]
        right = next((found for find in explicit if (found := find(answer)) is not None), answer)
        return given is not None and same_answer(given, right)

    def _extract(self, text: str) -> str | None:
        return next((found for find in self._ways if (found := find(text)) is not None), None)

    @property
    def _ways(self) -> tuple[AnswerExtractor, ...]:
        return (AfterHashes(), Boxed(), LastNumber()) if self.extractors is None else self.extractors


def same_answer(given: str, right: str) -> bool:
    r"""Tell whether two answers have the same value, however they are written.

    Compares as text, then as numbers (``1,000``, ``$5``, ``50%``), then as expressions (``\frac12`` and ``0.5``).
    Lists and intervals are compared piece by piece.

    Args:
        given: The answer to judge.
        right: The right answer.

    Example:
        >>> same_answer(r"\frac{\sqrt{8}}{2}", "2^{1/2}")
        True
    """
    given, right = _clean(given), _clean(right)
    if given == right:
        return bool(given)
    numbers = _number(given), _number(right)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    pieces = _pieces(given), _pieces(right)
    if len(pieces[0]) > 1 or len(pieces[1]) > 1:
        return (
            ((given[:1] + given[-1:]) == (right[:1] + right[-1:]) or given[:1] not in "([{")
            and len(pieces[0]) == len(pieces[1])
            and all(map(same_answer, *pieces))
        )
    return same_value(given, right)


def _clean(answer: str) -> str:
    answer = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", answer.strip().strip("$").strip())
    answer = re.sub(r"\\(?:left|right|[,;:! ])", "", answer).replace("\\$", "").replace("$", "")
    answer = re.sub(r"^[A-Za-z]\s*=\s*", "", answer)
    return re.sub(r"\s+", " ", answer).rstrip(".").strip()


def _number(answer: str) -> Fraction | None:
    percent = answer.endswith("%")
    plain = answer.rstrip("%").rstrip("\\").replace(" ", "")
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", plain):
        plain = plain.replace(",", "")
    if not re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)(/\d*[1-9]\d*)?", plain) or len(plain) > 200:
        return None
    numerator, _, denominator = plain.partition("/")
    value = Fraction(numerator) / Fraction(denominator or 1)
    return value / 100 if percent else value


def _pieces(answer: str) -> list[str]:
    """Split at the commas that are outside all brackets but an outermost pair."""
    inner = answer[1:-1] if answer[:1] in "([" and answer[-1:] in ")]" else answer
    pieces, depth = [""], 0
    for character in inner:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces

r"""Ways to find the final answer in a solution: after ``####``, in a box or tags, the last number, an option letter."""
# ruff: noqa: RUF001

import re
from abc import abstractmethod
from dataclasses import dataclass, field

from typing_extensions import override

from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Part

__all__ = [
    "AfterHashes",
    "AnswerExtractor",
    "AnswerPattern",
    "AnswerPhrase",
    "AnswerTags",
    "Boxed",
    "LastNumber",
    "OptionLetter",
]

_DIGITS = r"(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?![\w.]))?"
_GROUP = r"\s*(?:\{[^{}]*\}|\d)"
_SKIPPED = (
    r"(?:\d+/){2,}\d+"  # a date
    r"|(?<![A-Za-z])[A-Za-z]+_?\d\w*"  # H2O, x1
    r"|_(?:\{[^{}]*\}|\d+)"
    r"|[A-Za-z)\]}]\s*\^\s*(?:\{[^{}]*\}|-?\d+)"  # m^2
    rf"|{_DIGITS}[xyznabcpqrtuvwk](?![A-Za-z])"  # 5x
)
_VALUE = (
    r"(?P<sign>(?<![\w)}\]%])[-+\N{MINUS SIGN}]?)\s?(?:\\?\$|€|£)?(?P<inner>(?:(?<=[$€£])-)?)(?P<value>"
    rf"(?:{_DIGITS}\s*)?\\[dtc]?frac{_GROUP}{_GROUP}|(?:{_DIGITS}\s*)?\\sqrt(?:\[\d+\])?{_GROUP}|\d+(?::\d+)+"
    rf"|\d+\s+\d+/\d+|{_DIGITS}(?:\s?/\s?{_DIGITS}|\s?(?:\^|\*\*)\s?(?:-?\d+|\{{-?\d+\}}))?"
    r"(?:\s?(?:\\times|\\cdot|×|\*|x)\s?10\s?\^\s?(?:-?\d+|\{-?\d+\}))?)"
    r"(?P<after>\s?(?:\\?%|\\pi(?![A-Za-z])|π))?"
)
_NUMBER = re.compile(f"{_SKIPPED}|{_VALUE}")
_MATH = r"(?:\$\$(.{1,500}?)\$\$|\$([^$\n]{1,500})\$|\\\((.{1,500}?)\\\)|\\\[(.{1,500}?)\\\])"
_PHRASE = re.compile(rf"\banswer(?:\s+is|\s*:)\s*:?\s*\**\s*{_MATH}", re.IGNORECASE | re.DOTALL)
_LETTER = r"(?:\*\*|\\text(?:bf)?\{|\\mathrm\{|\$|\\boxed\{|[(\[])*\s*"
_OPTION_PHRASE = re.compile(
    rf"(?i:\b(?:answer|option|choice)(?:\s+is)?\s*:?)\s*(?i:(?:option|choice)\s+)?{_LETTER}"
    r"(?:([A-J])(?![A-Za-z'])(?!\s+(?!because|since|as|and|for|with)[a-z])|(?<=\()([a-j])(?=\)))"
)
_OPTION_ALONE = re.compile(r"(?:^|\n)[^\w\n]*([A-J])(?:[).:]\W.*|\W*)$")
_TAIL = 2000
"""Characters at the end of a text that are searched for an answer: the patterns take quadratic time on hostile text."""
_OPTION_BRACKETS = re.compile(r"\(([A-J])\)")


@dataclass(frozen=True, kw_only=True)
class AnswerExtractor(Part):
    """Base of the ways to find the final answer in a solution."""

    @abstractmethod
    def __call__(self, text: str) -> str | None:
        """Return the answer, or ``None`` if there is none.

        Args:
            text: A solution.
        """


@dataclass(frozen=True, kw_only=True)
class AfterHashes(AnswerExtractor):
    """The rest of the line after the last ``####``: the form of GSM8K."""

    @override
    def __call__(self, text: str) -> str | None:
        _, hashes, rest = text.rpartition("####")
        return rest.strip().partition("\n")[0].strip() or None if hashes else None


@dataclass(frozen=True, kw_only=True)
class AnswerPattern(AnswerExtractor):
    """The first match of a regular expression, or the last one.

    Args:
        pattern: Regular expression; its first group that took part in a match is the answer, or the whole match.
        last: Take the last match instead of the first.

    Raises:
        ConfigurationError: If the expression is faulty.
    """

    pattern: str = field(kw_only=False)
    last: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigurationError(f"pattern={self.pattern!r} is no regular expression: {error}.") from error

    @override
    def __call__(self, text: str) -> str | None:
        matches = list(re.finditer(self.pattern, text)) if self.last else [re.search(self.pattern, text)]
        match = matches[-1] if matches else None
        if match is None:
            return None
        return next((group for group in match.groups() if group is not None), match[0]).strip()


@dataclass(frozen=True, kw_only=True)
class Boxed(AnswerExtractor):
    r"""The content of the last complete ``\boxed{...}``, braces inside it included: the form of MATH."""

    @override
    def __call__(self, text: str) -> str | None:
        found: tuple[int, int] | None = None
        opened: list[int | None] = []
        for match in re.finditer(r"\\f?boxed\s*\{|\\.|[{}]", text, re.DOTALL):
            if match[0][-1] == "{" and match[0] != r"\{":
                opened.append(match.end() if len(match[0]) > 1 else None)
            elif match[0] == "}" and opened:
                start = opened.pop()
                if start is not None and (found is None or start > found[0]):
                    found = start, match.start()
        return None if found is None else text[found[0] : found[1]].strip()


@dataclass(frozen=True, kw_only=True)
class AnswerPhrase(AnswerExtractor):
    r"""The formula after the last "the answer is" or "answer:", if one is set there: ``$...$``, ``\(...\)``."""

    @override
    def __call__(self, text: str) -> str | None:
        found = _PHRASE.findall(text[-_TAIL:])
        return next((formula.strip() for formula in found[-1] if formula), None) if found else None


@dataclass(frozen=True, kw_only=True)
class AnswerTags(AnswerExtractor):
    """The content of the last complete pair of tags: ``<answer>...</answer>``, the form of Reasoning Gym and R1.

    Args:
        tag: Name of the tags.
    """

    tag: str = "answer"

    @override
    def __call__(self, text: str) -> str | None:
        before, closing, _ = text.rpartition(f"</{self.tag}>")
        _, opening, content = before.rpartition(f"<{self.tag}>")
        return content.strip() if closing and opening else None


@dataclass(frozen=True, kw_only=True)
class OptionLetter(AnswerExtractor):
    """The letter of a multiple-choice question, A to J: "The correct answer is B.", "**(C)**" or "D" alone."""

    @override
    def __call__(self, text: str) -> str | None:
        text = text[-_TAIL:]
        phrases = _OPTION_PHRASE.findall(text[-_TAIL:])
        if phrases:
            return str(phrases[-1][0] or phrases[-1][1]).upper()
        alone = _OPTION_ALONE.search(text.strip())
        if alone:
            return alone[1]
        letters = _OPTION_BRACKETS.findall(text)
        return str(letters[-1]) if letters else None


@dataclass(frozen=True, kw_only=True)
class LastNumber(AnswerExtractor):
    """The last number of the last 2,000 characters, as it is written, with its fraction, power or percent sign.

    Currency signs are dropped. Digits that belong to a name, an exponent, an index or a variable (``m^2``, ``x_1``,
    ``5x``) are not numbers.
    """

    @override
    def __call__(self, text: str) -> str | None:
        numbers = self.all(text[-_TAIL:])
        return numbers[-1] if numbers else None

    def all(self, text: str) -> list[str]:
        """Return every number of a text.

        Args:
            text: A solution.
        """
        matches = (match for match in _NUMBER.finditer(text) if match["value"])
        return [f"{match['sign'] or match['inner']}{match['value']}{match['after'] or ''}".strip() for match in matches]

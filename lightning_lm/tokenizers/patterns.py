"""Pre-tokenization: splitting text into words before byte-pair encoding, and safe places to cut a long text."""

import dataclasses
import functools
import re
from collections.abc import Callable

import regex

from lightning_lm.errors import TokenizerError

__all__ = ["GPT2", "GPT4", "QWEN2", "SplitPattern", "last_match"]


@dataclasses.dataclass(frozen=True)
class SplitPattern:
    """A regular expression that cuts text into words; byte-pair merges never cross a word's end.

    Characters that the expression leaves out become words of their own, so nothing is ever lost.

    Args:
        expression: In the syntax that ``regex``, tiktoken and Hugging Face `tokenizers` share. No capture groups.
        ascii_expression: The same for ASCII text, in the syntax of ``re``: it is twice as fast. Optional.
        cuts: A ``re`` expression of zero width: places where a text can be cut so that the words of both sides are the
            words of the whole. Without them, a stream of text can only be encoded as a whole.
    """

    expression: str
    ascii_expression: str = ""
    cuts: str = ""

    def __post_init__(self) -> None:
        try:
            compiled = regex.compile(self.expression)
        except regex.error as error:
            raise TokenizerError(f"The split pattern {self.expression!r} is no regular expression: {error}.") from error
        if compiled.groups:
            raise TokenizerError(f"The split pattern {self.expression!r} captures groups; write (?:...) for (...).")
        if compiled.fullmatch(""):
            raise TokenizerError(f"The split pattern {self.expression!r} matches nothing at all; use + in place of *.")

    @classmethod
    def of(cls, pattern: "SplitPattern | str") -> "SplitPattern":
        """Return the pattern of a name (``"gpt2"``, ``"gpt4"``, ``"qwen2"``) or of an expression."""
        return pattern if isinstance(pattern, SplitPattern) else _NAMED.get(pattern) or cls(pattern)

    def to_dict(self) -> dict[str, str]:
        """Return the arguments that make this pattern."""
        return dataclasses.asdict(self)

    @property
    def complete(self) -> str:
        """The expression with a last branch that takes up single characters that nothing else matches."""
        return self.expression if self in _NAMED.values() else rf"{self.expression}|[\s\S]"

    def split(self, text: str) -> list[str]:
        """Return the words of a text; joined they are the text again."""
        if self.ascii_expression and text.isascii():
            return _ascii_finder(self.ascii_expression)(text)
        return _finder(self.complete)(text)

    def last_cut(self, text: str) -> int:
        """Return the last place where the text may be cut, 0 if there is none."""
        return last_match(self.cuts, text) if self.cuts else 0


@functools.cache
def _finder(expression: str) -> Callable[[str], list[str]]:
    find_all: Callable[[str], list[str]] = regex.compile(expression).findall
    return find_all


@functools.cache
def _ascii_finder(expression: str) -> Callable[[str], list[str]]:
    return re.compile(expression, re.ASCII).findall


def last_match(expression: str, text: str) -> int:
    """Return where the last match of a ``re`` expression in a text begins, 0 if there is none."""
    pattern = re.compile(expression)
    window = 256
    while True:
        start = max(0, len(text) - window)
        last = 0
        for match in pattern.finditer(text, start):
            last = match.start()
        if last or not start:
            return last
        window *= 16


# No word has a space after something else, and letters and digits are never followed by other characters within a
# word. What stands left of such a place is therefore split the same way whatever follows, and the other way round.
# (No cut at the text's end: what comes next is unknown there.)
_CUTS = r"(?<=\S)(?= )|(?<=[^\W_])(?=[\s!-/:-@\[-`{-~])"

GPT2 = SplitPattern(
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    _CUTS,
)
"""Contractions, letters, digits, other characters, each with a leading space; white space (Radford et al. 2019)."""

GPT4 = SplitPattern(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    _CUTS,
)
"""Like GPT-2's, with digits grouped by at most three, contractions in any case and line ends kept apart (cl100k)."""

QWEN2 = SplitPattern(
    GPT4.expression.replace(r"\p{N}{1,3}", r"\p{N}"), GPT4.ascii_expression.replace("[0-9]{1,3}", "[0-9]"), _CUTS
)
"""Like GPT-4's, with each digit a word of its own: numbers of any length are read alike (Qwen2)."""

_NAMED = {"gpt2": GPT2, "gpt4": GPT4, "qwen2": QWEN2}

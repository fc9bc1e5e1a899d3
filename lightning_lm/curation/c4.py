"""Cleaning rules of C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2, and the released code).

Lines that are no sentences are taken out, and pages of which too little remains are removed. As the paper says, and
unlike the released code, a page with a curly bracket or "lorem ipsum" anywhere is removed, also if the line with it
would have been taken out. Sentences are counted by their terminal punctuation; the released code asks NLTK.
"""

import dataclasses
import re
from collections.abc import Mapping

from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.step import Bounds, Filter, check_bounds
from lightning_lm.curation.terminal_punctuation import num_sentences
from lightning_lm.curation.words import words_of
from lightning_lm.parts import Limit, Part

__all__ = ["C4Lines", "C4Quality", "c4_lines"]

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclasses.dataclass(frozen=True, kw_only=True)
class C4Lines(Part, limits={"min_words": Limit.NON_NEGATIVE, "max_word_length": Limit.NON_NEGATIVE}):
    """Rules by which lines are taken out of a page.

    Args:
        end_marks: Endings of a line that is kept; none keeps all. A line that ends with an ellipsis is taken out.
        min_words: Fewest words of a line that is kept.
        max_word_length: Longest word of a line that is kept, characters; ``None`` for no limit.
        javascript: Take out lines that mention JavaScript.
        policies: Take out lines that mention cookies, terms of use or a privacy policy.
        citations: Take marks of citations such as ``[3]`` and ``[edit]`` out of lines.
    """

    end_marks: tuple[str, ...] = (".", "?", "!", '"', "'")
    min_words: int = 3
    max_word_length: int | None = 1000
    javascript: bool = True
    policies: bool = True
    citations: bool = True


def c4_lines(text: str, rules: C4Lines = C4Lines()) -> str:
    """Return the text without the lines that C4 takes out.

    Args:
        text: Text of a document.
        rules: Rules of lines.
    """
    lowered = text.lower()
    unwanted: tuple[str, ...] = ("javascript",) if rules.javascript and "javascript" in lowered else ()
    if rules.policies:
        unwanted += tuple(phrase for phrase in _POLICY if phrase in lowered)
    longest = rules.max_word_length
    if longest is not None and words_of(text).lengths.max(initial=0) <= longest:
        longest = None
    if rules.citations and "[" in text:
        text = _CITATION.sub("", text)
    return "\n".join(
        line
        for line in map(str.strip, text.splitlines())
        if (not rules.end_marks or (line.endswith(rules.end_marks) and not line.endswith("...")))
        and len(line.split(None, rules.min_words)) >= rules.min_words
        and (longest is None or max(map(len, line.split()), default=0) <= longest)
        and not (unwanted and _mentions(line, unwanted))
    )


def _mentions(line: str, phrases: tuple[str, ...]) -> bool:
    lowered = line.lower()
    return any(phrase in lowered for phrase in phrases)


@dataclasses.dataclass(frozen=True, kw_only=True)
class C4Quality(Filter, limits={"min_sentences": Limit.NON_NEGATIVE}):
    """Takes lines that are no sentences out of a document, and removes it if it has too few sentences then.

    Args:
        min_sentences: Fewest sentences of the lines that are kept; ``None`` for no limit.
        curly_brackets: Keep documents with a ``{``, which is a sign of code.
        lorem_ipsum: Keep documents with the placeholder text "lorem ipsum".
        lines: Rules of lines; ``None`` keeps all lines.
    """

    min_sentences: int | None = 5
    curly_brackets: bool = False
    lorem_ipsum: bool = False
    lines: C4Lines | None = C4Lines()

    def measures(self, document: Document) -> Mapping[str, float]:
        """Return the numbers of curly brackets, of "lorem ipsum", and of sentences in the lines that are kept.

        Args:
            document: The document.
        """
        return self._measures(document.text, self._kept(document.text))

    def bounds(self) -> Mapping[str, Bounds]:
        """Return the limits by the name of the quantity."""
        return {
            "curly_brackets": Bounds(maximum=None if self.curly_brackets else 0),
            "lorem_ipsum": Bounds(maximum=None if self.lorem_ipsum else 0),
            "num_sentences": Bounds(self.min_sentences),
        }

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document with the lines that are kept, or its removal by the first rule that it breaks.

        Args:
            document: The document.
        """
        kept = self._kept(document.text)
        result = check_bounds(document, self._measures(document.text, kept), self.bounds())
        return result if isinstance(result, Removed) else dataclasses.replace(document, text=kept)

    def _kept(self, text: str) -> str:
        return text if self.lines is None else c4_lines(text, self.lines)

    @staticmethod
    def _measures(text: str, kept: str) -> dict[str, float]:
        return {
            "curly_brackets": text.count("{"),
            "lorem_ipsum": text.lower().count("lorem ipsum"),
            "num_sentences": num_sentences(kept),
        }

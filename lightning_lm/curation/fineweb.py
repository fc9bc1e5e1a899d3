"""Quality rules of FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.6), each on lines that are not blank."""

import dataclasses
from collections.abc import Mapping

from lightning_lm.curation.document import Document
from lightning_lm.curation.lines import duplicate_fractions, lines_of
from lightning_lm.curation.step import Bounds, Filter
from lightning_lm.curation.terminal_punctuation import terminal_punctuation
from lightning_lm.parts import Limit

__all__ = ["FineWebQuality", "fineweb_quality"]


def fineweb_quality(text: str, *, short_line: int = 30, line_breaks: bool = False) -> dict[str, float]:
    """Return the measured quantities of FineWeb's rules.

    Args:
        text: Text of a document.
        short_line: Length of the longest short line, characters.
        line_breaks: Also return line breaks per word.

    Returns:
        Fractions of lines that end with terminal punctuation, of characters in lines that repeat an earlier one, and of
        short lines.
    """
    lines, terminal = lines_of(text), terminal_punctuation()
    num_lines = max(len(lines), 1)
    measures = {
        "terminal_punctuation": sum(line[-1] in terminal for line in lines) / num_lines,
        "duplicate_line_characters": duplicate_fractions(lines)[1],
        "short_lines": sum(len(line) <= short_line for line in lines) / num_lines,
    }
    if line_breaks:
        measures["line_breaks_per_word"] = text.count("\n") / max(len(text.split()), 1)
    return measures


_LIMITS = {
    **dict.fromkeys(("min_terminal_punctuation", "max_duplicate_line_characters", "max_short_lines"), Limit.FRACTION),
    "max_line_breaks_per_word": Limit.NON_NEGATIVE,
    "short_line": Limit.NON_NEGATIVE,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineWebQuality(Filter, limits=_LIMITS):
    """Keeps documents within the limits of FineWeb's rules; ``None`` turns a rule off.

    Limits are those of the paper. The released code removes documents from 0.01 of duplicate characters on, and from
    0.3 line breaks per word on, a rule that the paper does not list.

    Args:
        min_terminal_punctuation: Smallest fraction of lines that end with terminal punctuation.
        max_duplicate_line_characters: Largest fraction of characters in lines that repeat an earlier line.
        max_short_lines: Largest fraction of short lines.
        max_line_breaks_per_word: Most line breaks per word.
        short_line: Length of the longest short line, characters.
    """

    min_terminal_punctuation: float | None = 0.12
    max_duplicate_line_characters: float | None = 0.1
    max_short_lines: float | None = 0.67
    max_line_breaks_per_word: float | None = None
    short_line: int = 30

    def measures(self, document: Document) -> Mapping[str, float]:
        """Return the quantities of `fineweb_quality`.

        Args:
            document: The document.
        """
        breaks = self.max_line_breaks_per_word is not None
        return fineweb_quality(document.text, short_line=self.short_line, line_breaks=breaks)

    def bounds(self) -> Mapping[str, Bounds]:
        """Return the limits by the name of the quantity."""
        return {
            "terminal_punctuation": Bounds(self.min_terminal_punctuation),
            "duplicate_line_characters": Bounds(maximum=self.max_duplicate_line_characters),
            "short_lines": Bounds(maximum=self.max_short_lines),
            "line_breaks_per_word": Bounds(maximum=self.max_line_breaks_per_word),
        }

"""Verdicts in a judge's reply: the last line, such as ``Verdict: A`` or ``Verdict: 7``."""

import re
from collections.abc import Callable
from typing import Literal

__all__ = ["Side", "grade_in", "side_in"]

Side = Literal["A", "B", "tie"]
_VERDICT = re.compile(r"(?:final )?verdict(?: is)?\s*:?\s*(?P<said>.+)", re.IGNORECASE)
_SIDE = re.compile(r"(?:(?:answer|assistant|response)\s+)?(?P<side>a|b|tie)(?:\s+(?:is better|wins))?", re.IGNORECASE)
_GRADE = re.compile(r"(?P<grade>\d{1,3}(?:\.\d+)?)(?:\s*(?:/|out of)\s*(?P<most>\d+))?")
_DECORATION = re.compile(r"[*_`#>\[\](){}\"']")


def side_in(reply: str) -> Side | None:
    r"""Return the better answer by the last line of a reply, or ``None`` if the line is no clear verdict.

    Args:
        reply: A judge's reply.

    Example:
        >>> side_in("The first is wrong.\n**Verdict: B**"), side_in("Verdict: A or B")
        ('B', None)
    """
    found = _SIDE.fullmatch(_said(reply))
    sides: dict[str, Side] = {"a": "A", "b": "B", "tie": "tie"}
    return None if found is None else sides[found["side"].lower()]


def grade_in(lowest: float, highest: float) -> Callable[[str], float | None]:
    r"""Return a function that reads the grade in the last line of a reply; ``None`` if there is none in the range.

    Args:
        lowest: Smallest grade.
        highest: Largest grade.

    Example:
        >>> grade_in(1, 10)("Clear.\nVerdict: 7/10"), grade_in(1, 10)("Verdict: 11")
        (7.0, None)
    """

    def read(reply: str) -> float | None:
        found = _GRADE.fullmatch(_said(reply))
        if found is None or (found["most"] is not None and float(found["most"]) != highest):
            return None
        grade = float(found["grade"])
        return grade if lowest <= grade <= highest else None

    return read


def _said(reply: str) -> str:
    """Return the words of the verdict: after ``Verdict:``, or within double brackets, in the last line."""
    line = reply.rstrip().rpartition("\n")[2].strip()
    bare = _DECORATION.sub("", line).strip().rstrip(".!").strip()
    found = _VERDICT.fullmatch(bare)
    return found["said"].strip() if found else bare if re.fullmatch(r"\W*\[\[.+\]\]\W*", line) else ""

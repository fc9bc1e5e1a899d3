r"""Equality of two mathematical answers: numbers, words, expressions, lists, sets, intervals, equations, matrices.

An answer is taken apart from the outside in: alternatives (``x=2 or x=3``), then sets and intervals, then tuples and
matrices, then equations, and at last expressions, which `expressions` reads. A verdict is ``None`` where one of the
answers could not be read; `math-verify`, if it is installed, then has the last word.
"""

import importlib
import re
from collections.abc import Sequence
from typing import Any

from lightning_lm.rewards.expressions import ExpressionError, parse_expression
from lightning_lm.rewards.notation import Answer, as_number, is_words, read_answer, split_outside_brackets

__all__ = ["compare_answers", "quick_verdict", "verify_with_library"]

_RELATION = r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<|>|\\ne(?![A-Za-z])|(?<![<>!])="
_REVERSED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}
_NAME = r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?"
_MATRIX = re.compile(r"[(\[]?\s*\\begin\{([pb]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}\s*[)\]]?", re.DOTALL)
_MAX_ITEMS = 32


def quick_verdict(given: str, right: str) -> bool | None:
    """Compare two answers without sympy: equal texts, numbers and words; ``None`` if that does not decide it.

    Args:
        given: Answer to score.
        right: The right answer.
    """
    left, other = read_answer(given), read_answer(right)
    if left == other:
        return bool(left.text)
    if not left.text or not other.text or not _same_unit(left, other):
        return False
    if left.text == other.text:
        return True
    number, right_number = as_number(left.text), as_number(other.text)
    if number is not None and right_number is not None:
        (value, percent), (expected, expects_percent) = number, right_number
        if percent == expects_percent:
            return value == expected
        # 50% is written for one half and for the number of percent: "What percentage ...?" has the answer 50.
        whole = value == expected and value.denominator == 1
        return whole or (value / 100 == expected if percent else value == expected / 100)
    if is_words(left.text) or is_words(other.text):
        return _same_words(left.text, other.text)
    return None


def _same_unit(left: Answer, right: Answer) -> bool:
    return not left.unit or not right.unit or left.unit == right.unit


def _same_words(left: str, right: str) -> bool | None:
    if left.lower() == right.lower():
        return True
    both = is_words(left) and is_words(right)
    # "xy" may be a product when the other answer is an expression, but never when both are words.
    return (
        False
        if both or max(len(re.sub(r"[^A-Za-z]", "", text)) for text in (left, right) if is_words(text)) > 3
        else None
    )


def compare_answers(given: str, right: str) -> bool | None:
    r"""Compare two answers by value; ``None`` if one of them cannot be read.

    Args:
        given: Answer to score.
        right: The right answer.

    Example:
        >>> compare_answers(r"x=2 \text{ or } x=3", r"\{3, 2\}")
        True
    """
    verdict = quick_verdict(given, right)
    if verdict is not None:
        return verdict
    left, other = read_answer(given).text, read_answer(right).text
    try:
        return _same(left, other)
    except ExpressionError:
        return None


def _same(left: str, right: str) -> bool:
    lists = _items(left), _items(right)
    if any(items is not None for items in lists):
        found = [[text] if items is None else items for items, text in zip(lists, (left, right), strict=True)]
        return _same_items(*found)
    if _is_set(left) or _is_set(right):
        return bool(_as_set(left) == _as_set(right))
    matrices = _matrix(left), _matrix(right)
    if matrices[0] is not None or matrices[1] is not None:
        return _same_rows(*matrices)
    tuples = _tuple(left), _tuple(right)
    if tuples[0] is not None or tuples[1] is not None:
        return _same_rows(*tuples)
    relations = [split_outside_brackets(text, _RELATION) for text in (left, right)]
    if any(len(sides) > 1 for sides in relations):
        return _same_relation(left, right)
    return _same_expression(left, right)


# --- lists and sets of alternatives ---


def _items(text: str) -> list[str] | None:
    """Return the elements of an unordered list or of a finite set; ``None`` if the answer is one value."""
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return []
    braces = re.fullmatch(r"\\\{(.*)\\\}", text)
    inner = re.sub(r"^[A-Za-z](?:_\d)?\s*\\in\s*(?=\\\{)", "", text) if braces is None else braces[1]
    if inner != text and braces is None:
        return _items(inner)
    pieces = split_outside_brackets(inner, r",(?!\d{3}(?!\d))\s*(?:(?:and|or) )?|;|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
    pieces = [piece for piece in _with_names(pieces) if piece]
    pieces = [sign for piece in pieces for sign in _both_signs(piece)]
    if len(pieces) > _MAX_ITEMS:
        raise ExpressionError(f"A list of {len(pieces)} elements is not compared; the limit is {_MAX_ITEMS}.")
    return pieces if braces is not None or len(pieces) > 1 else None


def _with_names(pieces: Sequence[str]) -> list[str]:
    """Drop the name that all alternatives have, or that stands before the first: ``x = 2, 3`` and ``x=2 or x=3``."""
    matches = [re.fullmatch(rf"({_NAME})\s*(?:=|\\in)\s*([^=<>]*)", piece) for piece in pieces]
    names = {match[1] for match in matches if match}
    if len(pieces) > 1 and len(names) == 1 and matches[0] is not None:
        return [piece if match is None else match[2] for piece, match in zip(pieces, matches, strict=True)]
    return list(pieces)


def _both_signs(piece: str) -> list[str]:
    if piece.count(r"\pm") != 1:
        return [piece]
    bare = re.sub(rf"^{_NAME}\s*=\s*", "", piece)
    return [bare.replace(r"\pm", sign) for sign in "+-"]


def _same_items(left: Sequence[str], right: Sequence[str]) -> bool:
    left, right = _distinct(left), _distinct(right)
    if len(left) != len(right):
        return False
    remaining = list(right)
    for item in left:
        match = next((other for other in remaining if compare_answers(item, other)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def _distinct(items: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for item in items:
        if not any(compare_answers(item, other) for other in kept):
            kept.append(item)
    return kept


# --- intervals ---


def _is_set(text: str) -> bool:
    """Tell whether an answer can only be a set of real numbers: ``(1,2)`` alone may also be a point."""
    if re.search(r"\\cup|\\mathbb\{R\}|\\in(?![a-z])|\\cap|\\setminus", text):
        return True
    if re.fullmatch(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]", text) and (
        r"\infty" in text or (text[0] + text[-1]) in ("[)", "(]")
    ):
        return True
    sides = split_outside_brackets(text, _RELATION)
    signs = re.findall(_RELATION, text)
    names = [side for side in sides if re.fullmatch(_NAME, side)]
    return len(names) == 1 and len(sides) in (2, 3) and not {"=", r"\ne"} & set(signs)


def _as_set(text: str) -> Any:
    import sympy

    text = re.sub(r"^[A-Za-z]\s*\\in(?![a-z])\s*", "", text)
    if text == r"\mathbb{R}":
        return sympy.S.Reals
    parts = split_outside_brackets_of_intervals(text)
    if len(parts) > 1:
        return sympy.Union(*map(_as_set, parts))
    interval = re.fullmatch(r"([(\[])(.*)([)\]])", text)
    ends = split_outside_brackets(interval[2], ",") if interval else []
    if interval and len(ends) == 2:
        low, high = map(parse_expression, ends)
        return sympy.Interval(low, high, interval[1] == "(", interval[3] == ")")
    return _from_inequality(text)


def split_outside_brackets_of_intervals(text: str) -> list[str]:
    r"""Split at each ``\cup``; brackets do not match there: ``[0,1)``.

    Args:
        text: A union of intervals.
    """
    return [part.strip() for part in re.split(r"\\cup(?![A-Za-z])", text)]


def _from_inequality(text: str) -> Any:
    import sympy

    sides, signs = split_outside_brackets(text, _RELATION), re.findall(_RELATION, text)
    place = next((place for place, side in enumerate(sides) if re.fullmatch(_NAME, side)), None)
    if place is None or not signs:
        raise ExpressionError(f"{text!r} is not a set of numbers.")
    low, high, left_open, right_open = -sympy.oo, sympy.oo, True, True
    for number, sign in enumerate(signs):
        if number + 1 not in (place, place + 1):
            raise ExpressionError(f"{text!r} is not a set of numbers.")
        after = number >= place
        bound = parse_expression(sides[number + 1] if after else sides[number])
        sign = sign if after else _REVERSED[sign]
        if sign in ("<", r"\le"):
            high, right_open = bound, sign == "<"
        elif sign in (">", r"\ge"):
            low, left_open = bound, sign == ">"
        else:
            raise ExpressionError(f"{text!r} is not a set of numbers.")
    return sympy.Interval(low, high, left_open, right_open)


# --- tuples and matrices ---


def _tuple(text: str) -> list[list[str]] | None:
    match = re.fullmatch(r"([(\[]|\\langle)(.*)([)\]]|\\rangle)", text)
    pieces = split_outside_brackets(match[2], r",(?!\d{3}(?!\d))") if match else []
    if match is None or len(pieces) < 2:
        return None
    return [[match[1].replace(r"\langle", "(") + match[3].replace(r"\rangle", ")")], pieces]


def _matrix(text: str) -> list[list[str]] | None:
    match = _MATRIX.fullmatch(text)
    if match is None:
        return None
    rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
    return [[entry.strip() for entry in row.split("&")] for row in rows]


def _same_rows(left: list[list[str]] | None, right: list[list[str]] | None) -> bool:
    if left is None or right is None or list(map(len, left)) != list(map(len, right)):
        return False
    pairs = [pair for rows in zip(left, right, strict=True) for pair in zip(*rows, strict=True)]
    return all(one == other or bool(compare_answers(one, other)) for one, other in pairs)


# --- equations and expressions ---


def _same_relation(left: str, right: str) -> bool:
    parsed = [_relation(text) for text in (left, right)]
    (one, sign, name), (other, other_sign, other_name) = parsed
    if sign is None or other_sign is None:
        # "x = 5" for 5: the name before the sign is no part of the value.
        if (sign or other_sign) != "=" or not (name or other_name):
            raise ExpressionError(f"{left!r} and {right!r} are of different kinds.")
        values = [split_outside_brackets(text, "=")[-1] for text in (left, right)]
        return _same(*values)
    if sign != other_sign:
        if _REVERSED[sign] != other_sign:
            return False
        other = -other
    import sympy

    ratio = sympy.simplify(one / other)
    return bool(ratio.is_number and ratio.is_nonzero and (sign in ("=", r"\ne") or ratio.is_positive))


def _relation(text: str) -> tuple[Any, str | None, str]:
    """Return left side minus right side, the sign between, and the name if one stands alone on the left."""
    sides, signs = split_outside_brackets(text, _RELATION), re.findall(_RELATION, text)
    if not signs:
        return None, None, ""
    if set(signs) == {"="}:
        sides = [sides[0], sides[-1]]
    elif len(signs) > 1:
        raise ExpressionError(f"{text!r} has several relations.")
    name = sides[0] if re.fullmatch(_NAME, sides[0]) else ""
    function = re.fullmatch(r"([A-Za-z])\s*\(.*\)", sides[0])
    left = parse_expression(function[1] if name and function else sides[0])
    return left - parse_expression(sides[1]), signs[0], name


def _same_expression(left: str, right: str) -> bool:
    one, other = parse_expression(left), parse_expression(right)
    if one == other:
        return True
    equal = (one - other).equals(0)
    if equal is None:
        raise ExpressionError(f"Whether {left!r} equals {right!r} is not known.")
    return bool(equal)


# --- the library ---


def verify_with_library(given: str, right: str) -> bool:
    """Compare two answers with math-verify.

    Args:
        given: Answer to score.
        right: The right answer.

    Raises:
        ImportError: If it is not installed.
    """
    library: Any = importlib.import_module("math_verify")
    texts = [f"${text.strip().strip('$')}$" for text in (right, given)]
    expected, found = (
        library.parse(text, [library.LatexExtractionConfig()], parsing_timeout=0, fallback_mode="no_fallback")
        for text in texts
    )
    return bool(expected and found and library.verify(expected, found, timeout_seconds=0))

r"""One spelling for mathematical answers: LaTeX, plain text and Unicode become the same short notation.

``\dfrac{1}{2}\text{ cm}``, ``½ cm`` and ``$\frac12$ centimeters`` all become an expression (``\frac{1}{2}``) and a unit
(``cm``). Nothing is computed here; see `comparison` for that.
"""
# ruff: noqa: RUF001

import re
from fractions import Fraction
from typing import NamedTuple

__all__ = ["Answer", "as_number", "is_words", "read_answer", "split_outside_brackets"]

_UNICODE = {
    "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "·": r"\cdot ", "×": r"\times ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ",
    "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "°": r"^\circ ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ",
    "μ": r"\mu ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ", "\N{NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " ",
}  # fmt: skip
_RESPELLED = (
    (r"√\s*\(([^()]*)\)|√\s*(\w)", r"\\sqrt{\1\2}"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:leqslant|leq)(?![A-Za-z])|<=", r"\\le "),
    (r"\\(?:geqslant|geq)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\varnothing", r"\\emptyset"),
    (r"\\(?:Bbb|mathbf)\s*\{?R\}?", r"\\mathbb{R}"),
    (r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|displaystyle|textstyle|limits)(?![A-Za-z])\.?", ""),
    (r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|operatorname|boldsymbol)\s*\{([^{}]*)\}", r" \1 "),
    (r"\{,\}|(?<=\d)\\[,! ]\s*(?=\d{3}(?!\d))", ","),
    (r"(?<!\\)\\(?:[,;:! ]|quad|qquad)(?![A-Za-z])|~", " "),
    (r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![A-Za-z]))", " degrees "),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    (r"\\%|\\?\s*(?<=[\d ])(?:percent|pct)\b", "%"),
)  # fmt: skip

_UNIT_NAMES = {
    "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre", "m": "meter metre",
    "kg": "kilogram", "g": "gram gm", "l": "liter litre", "ml": "milliliter millilitre", "s": "second sec",
    "min": "minute", "h": "hour hr", "inch": "inche in", "foot": "feet ft", "yard": "yd", "mile": "mi",
    "lb": "pound lbs", "oz": "ounce", "degree": "deg", "dollar": "usd buck", "euro": "eur", "cent": "¢",
    "square": "sq", "cubic": "cu",
}  # fmt: skip
_UNITS = {alias: name for name, aliases in _UNIT_NAMES.items() for alias in aliases.split()}
_SHORT_UNITS = {"m", "s", "g", "h", "l", "L", "V", "N", "J", "W", "K", "C", "F", "A"}
_NOT_UNITS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "pi", "sqrt", "or", "and", "mod", "arcsin", "arccos",
    "arctan", "max", "min", "abs", "choose",
}  # fmt: skip
_UNIT = re.compile(r"(?<=[\d})!\]a-z ])\s*((?:(?<![A-Za-z\\])[A-Za-z]+(?:\s*\^\s*\{?\s*-?\d\s*\}?)?[\s/.\-]*)+)$")
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:[, ]\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?")


class Answer(NamedTuple):
    """An answer in one notation.

    Args:
        text: Expression, set, relation or words, without its unit.
        unit: Canonical name of the unit, empty if there is none.
    """

    text: str
    unit: str


def read_answer(text: str) -> Answer:
    r"""Return an answer in the notation that the other functions here read.

    Args:
        text: For example ``$\dfrac{3}{4}$ hours``.
    """
    text = text.strip()
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$")):
        if text.startswith(opening) and text.rstrip(".").endswith(closing) and len(text) > 2 * len(opening):
            text = text.rstrip(".")[len(opening) : -len(closing)].strip()
    text = text.strip("*`").strip()
    text, money = _without_currency(text)
    for character, spelling in _UNICODE.items():
        text = text.replace(character, spelling)
    for pattern, spelling in _RESPELLED:
        text = re.sub(pattern, spelling, text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".").strip()
    text = re.sub(r"^(-?)\s+(?=[\d\\(])", r"\1", text)
    option = re.fullmatch(r"\(?([A-Za-z])[).:]?", text)
    if option:
        return Answer(option[1], "")
    text, unit = _without_unit(text)
    return Answer(text, unit or money)


def _without_currency(text: str) -> tuple[str, str]:
    found = re.search(r"\\?\$|€|£|¥|₹", text)
    unit = "" if found is None else {"€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}.get(found[0], "dollar")
    bare = re.sub(r"\\?\$|€|£|¥|₹", "", text)
    return bare.strip(), unit if re.match(r"[-+]?\s*(?:\\?\$|€|£|¥|₹)", text) and text.count("$") <= 1 else ""


def _without_unit(text: str) -> tuple[str, str]:
    """Cut the words off that end an answer which has a number before them."""
    match = _UNIT.search(text)
    if match is None or not any(map(str.isdigit, text[: match.start(1)])) or re.search(r"[,=<>]|\\[lgi]", match[1]):
        return text, ""
    words = re.findall(r"[A-Za-z]+|\^\s*\{?\s*-?\d", match[1])
    names = [word for word in words if word[0] != "^"]
    if set(names) & _NOT_UNITS or any(len(name) == 1 and name not in _SHORT_UNITS for name in names):
        return text, ""
    if len(names[0]) <= 2 and names[0] not in _UNITS and names[0] not in _UNIT_NAMES and names[0] not in _SHORT_UNITS:
        return text, ""
    if len(names[0]) == 1 and not text[: match.start(1)].endswith(" "):
        return text, ""
    return text[: match.start(1)].strip().rstrip("-").strip(), " ".join(map(_unit_name, words))


def _unit_name(word: str) -> str:
    if word[0] == "^":
        return f"^{word[-1]}"
    low = word.lower()
    for candidate in (low, low.removesuffix("s")):
        if candidate in _UNITS or candidate in _UNIT_NAMES:
            return _UNITS.get(candidate, candidate)
    return low.removesuffix("s") if len(low) > 3 else low


def as_number(text: str) -> tuple[Fraction, bool] | None:
    """Return the value of a plain number and whether it is a percentage; ``None`` if it is something else.

    Args:
        text: For example ``-1,234.5``, ``3/4``, ``1 1/2``, ``50%`` or ``2.5e3``.
    """
    percent = text.endswith("%")
    text = text.rstrip("%").strip()
    if len(text) > 200:
        return None
    mixed = re.fullmatch(r"([-+]?)(\d+) (\d+)/(\d*[1-9]\d*)", text)
    if mixed:
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return (-value if mixed[1] == "-" else value), percent
    numerator, slash, denominator = text.partition("/")
    parts = [part.strip() for part in ((numerator, denominator) if slash else (numerator,))]
    if not all(_PLAIN_NUMBER.fullmatch(part) for part in parts):
        return None
    values = [Fraction(part.replace(",", "").replace(" ", "")) for part in parts]
    if len(values) == 2 and values[1] == 0:
        return None
    return (values[0] / values[1] if slash else values[0]), percent


def is_words(text: str) -> bool:
    """Tell whether an answer is one or more words: several letters without a sign between them.

    Args:
        text: An answer without its unit.
    """
    text = re.sub(r"\\(?:angle|triangle|overline|overrightarrow|widehat|vec)\s*\{?([A-Za-z]+)\}?", r"segment \1", text)
    return re.fullmatch(r"[A-Za-z]{2,}|(?:[A-Za-z'-]+ )+[A-Za-z'-]+", text) is not None and text not in ("pi", "ln")


def split_outside_brackets(text: str, separators: str) -> list[str]:
    r"""Split a text at separators that no bracket encloses.

    Args:
        text: For example ``(1,2),(3,4)``.
        separators: Regular expression of a separator.

    Example:
        >>> split_outside_brackets("(1,2),(3,4)", ",")
        ['(1,2)', '(3,4)']
    """
    pieces, start, depth, place = [], 0, 0, 0
    pattern = re.compile(separators)
    while place < len(text):
        character = text[place]
        match = pattern.match(text, place) if depth == 0 else None
        if match:
            pieces.append(text[start:place])
            place = start = match.end()
            continue
        depth += (character in "([{") - (character in ")]}")
        place += 1
    return [piece.strip() for piece in [*pieces, text[start:]]]

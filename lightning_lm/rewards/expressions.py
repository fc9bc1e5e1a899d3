"""Reads a mathematical answer, plain or LaTeX, into a sympy expression without evaluating any code.

``sympy.parse_expr`` runs ``eval`` on its input, which no model's answer may reach. This is a small recursive-descent
parser instead: numbers, names, ``+ - * / ^ !``, roots, fractions, the usual functions, and multiplication by writing
things beside each other. What it does not know it refuses.
"""

import re
from typing import Any

from lightning_lm.errors import DataError, MissingDependencyError

__all__ = ["ExpressionError", "parse_expression", "same_value"]

_MAX_LENGTH = 200
"""Characters. A longer answer is not one: comparing two large expressions could take minutes."""
_MAX_DIGITS = 1000
"""A power or a factorial of more digits is refused: 9^9^9 has 370 million."""

_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)|\\([A-Za-z]+)|([A-Za-z])|(\*\*|[-+*/^(){}\[\]!=,_|]))")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "exp", "ln", "log", "sqrt"}
_SYMPY_NAMES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log"}
_INVERSES = {"sin": "asin", "cos": "acos", "tan": "atan", "cot": "acot", "sec": "asec", "csc": "acsc"}
_BRACKETS = {"|": ("|", "Abs"), "\\lvert": ("\\rvert", "Abs"), "\\lfloor": ("\\rfloor", "floor")}
_BRACKETS |= {"\\lceil": ("\\rceil", "ceiling")}
_SPACES = {"left", "right", "displaystyle", "quad", "qquad"}
_LETTERS = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar"
)
_GREEK = frozenset(_LETTERS.split())
_CONSTANTS = {"\\pi": "pi", "\\infty": "oo", "\\imath": "I", "e": "E", "i": "I"}
_LONGEST_PRODUCT = 3
"""Letters. A longer run without a sign is a word: "east" is not e * a * s * t, and so not "seat"."""


class ExpressionError(DataError):
    """A text that is not an expression this parser knows."""


def parse_expression(text: str) -> Any:
    r"""Return the sympy expression that a text means.

    Args:
        text: For example ``1/2``, ``\frac{\sqrt{3}}{2}``, ``2x + 1`` or ``50\%``.

    Raises:
        ExpressionError: If the text is too long, or holds anything but an expression.
        MissingDependencyError: If sympy is not installed.

    Example:
        >>> parse_expression(r"\frac{1}{2} x^2")
        x**2/2
    """
    if len(text) > _MAX_LENGTH:
        raise ExpressionError(f"An answer of {len(text)} characters is not compared; the limit is {_MAX_LENGTH}.")
    parser = _Parser(_tokens(text))
    value = parser.sum()
    if parser.peek() is not None:
        raise ExpressionError(f"Cannot read {text!r}: {parser.peek()!r} is out of place.")
    return value


def same_value(left: str, right: str) -> bool:
    """Return whether two expressions are equal for all values of their variables; false if either cannot be read.

    Args:
        left: An expression, as `parse_expression` reads it.
        right: Another.
    """
    try:
        difference = parse_expression(left) - parse_expression(right)
    except ExpressionError:
        return False
    return difference == 0 or bool(difference.equals(0))


def _tokens(text: str) -> list[str]:
    text = re.sub(r"\\[,;:! ]", " ", text.replace("\\%", "%").replace("\N{MINUS SIGN}", "-").replace("π", r"\pi "))
    text = text.replace("·", "*").replace("\N{MULTIPLICATION SIGN}", "*").replace("÷", "/").replace("%", "/100")
    text = _plain_numbers(text.strip())
    _refuse_words(text)
    tokens, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ExpressionError(f"Cannot read {text!r}: {text[place]!r} is not part of an expression.")
        number, command, name, sign = match.groups()
        place = match.end()
        if command in _SPACES:
            continue
        tokens.append(number or (f"\\{command}" if command else None) or name or sign)
    return _join_function_names(tokens)


def _plain_numbers(text: str) -> str:
    """Write repeating decimals, thousands separators and mixed numbers such as ``1 1/2`` out."""
    text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", _repeating, text)
    text = re.sub(r"(?<![\w.^}])(\d+)\s*\\frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)\s*(\d))", _mixed, text)
    return re.sub(r"(?<![\w.^}])(\d+) (\d+)\s*/\s*(\d+)(?![\w.])", _mixed, text)


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, repeated = match[1] or "0", match[2], match[3]
    nines = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    return f"({whole}+{int(fixed + repeated) - int(fixed or 0)}/{nines})"


def _mixed(match: re.Match[str]) -> str:
    whole, numerator, denominator = (int(group) for group in match.groups() if group is not None)
    return f"({whole}+{numerator}/{denominator})" if numerator < denominator else match[0]


def _refuse_words(text: str) -> None:
    without = re.sub(r"\\[A-Za-z]+", " ", text)
    for name in sorted(_FUNCTIONS | {"pi"}, key=len, reverse=True):
        without = without.replace(name, " ")
    word = re.search(rf"[A-Za-z]{{{_LONGEST_PRODUCT + 1},}}", without)
    if word:
        raise ExpressionError(f"Cannot read {text!r}: {word[0]!r} is a word.")


def _join_function_names(tokens: list[str]) -> list[str]:
    """Make one token of the letters of a function written without a backslash, such as ``s q r t``."""
    joined: list[str] = []
    place = 0
    while place < len(tokens):
        for name in sorted(_FUNCTIONS | {"pi"}, key=len, reverse=True):
            if tokens[place : place + len(name)] == list(name):
                joined.append(f"\\{name}")
                place += len(name)
                break
        else:
            joined.append(tokens[place])
            place += 1
    return joined


def _digits(value: Any) -> int:
    return max(len(str(abs(value.p))), len(str(value.q))) if value.is_Rational else 1


class _Parser:
    """One token at a time: sum > product > sign > power > atom, each a method that calls the next."""

    def __init__(self, tokens: list[str]) -> None:
        try:
            import sympy
        except ImportError as error:
            raise MissingDependencyError("sympy", "compare mathematical answers") from error
        self.sympy = sympy
        self.tokens = tokens
        self.place = 0
        self.closing: list[str] = []  # of the brackets that look alike at both ends

    def peek(self) -> str | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if token is None or (expected is not None and token != expected):
            raise ExpressionError(f"Expected {expected or 'a value'}, found {token or 'the end'}.")
        self.place += 1
        return token

    def sum(self) -> Any:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> Any:
        value = self.signed()
        while True:
            token = self.peek()
            if token in ("*", "\\cdot", "\\times", "\\ast"):
                self.take()
                value = value * self.signed()
            elif token in ("/", "\\div"):
                self.take()
                value = value / self.signed()
            elif self.starts_factor(token):
                value = value * self.power()
            else:
                return value

    def starts_factor(self, token: str | None) -> bool:
        """Tell whether a token begins a factor that is written beside another."""
        if token is None or token in self.closing[-1:]:
            return False
        return token[0].isalnum() or token[0] == "." or token in "({|" or token[0] == "\\"

    def signed(self) -> Any:
        if self.peek() in ("+", "-"):
            return self.signed() if self.take() == "+" else -self.signed()
        return self.power()

    def power(self) -> Any:
        base = self.atom()
        while self.peek() == "!":
            self.take()
            if not (base.is_Integer and 0 <= base <= _MAX_DIGITS):
                raise ExpressionError(f"The factorial of {base} is not taken.")
            base = self.sympy.factorial(base)
        if self.peek() not in ("^", "**"):
            return base
        self.take()
        exponent = self.signed()
        if exponent.is_number and not abs(exponent) * _digits(base) <= _MAX_DIGITS:
            raise ExpressionError(f"A power of more than {_MAX_DIGITS} digits is not taken.")
        return base**exponent

    def group(self, opening: str, closing: str) -> Any:
        self.take(opening)
        value = self.sum()
        self.take(closing)
        return value

    def argument(self) -> Any:
        token = self.peek()
        if token == "{":
            return self.group("{", "}")
        if token is not None and token.isdigit():
            # Without braces TeX takes one character: \\frac12 is one half.
            self.tokens[self.place : self.place + 1] = [token[0], *filter(None, [token[1:]])]
            return self.sympy.Integer(self.take())
        return self.group("(", ")") if token == "(" else self.power()

    def atom(self) -> Any:
        token = self.peek()
        if token == "(":
            return self.group("(", ")")
        if token == "{":
            return self.group("{", "}")
        token = self.take()
        if token in _BRACKETS:
            return self.between(*_BRACKETS[token])
        if token[0].isdigit() or token[0] == ".":
            base = self.subscript()[1:]
            return self.sympy.Rational(token.rstrip(".")) if not base else self.in_base(token, base)
        if token in _CONSTANTS:
            return getattr(self.sympy, _CONSTANTS[token])
        if token.isalpha() or token.lstrip("\\") in _GREEK:
            return self.sympy.Symbol(token.lstrip("\\") + self.subscript())
        return self.command(token)

    def in_base(self, digits: str, base: str) -> Any:
        if not (
            base.isdecimal()
            and 2 <= int(base) <= 10
            and all(digit.isdecimal() and int(digit) < int(base) for digit in digits)
        ):
            raise ExpressionError(f"{digits!r} is not a number in base {base}.")
        return self.sympy.Integer(int(digits, int(base)))

    def between(self, closing: str, function: str) -> Any:
        self.closing.append(closing)
        value = self.sum()
        self.closing.pop()
        self.take(closing)
        return getattr(self.sympy, function)(value)

    def subscript(self) -> str:
        if self.peek() != "_":
            return ""
        self.take()
        if self.peek() != "{":
            return f"_{self.take()}"
        self.take()
        name = ""
        while self.peek() != "}":
            name += self.take()
        self.take()
        return f"_{name}"

    def command(self, token: str) -> Any:
        name = token.lstrip("\\")
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            return self.argument() / self.argument()
        if name in ("binom", "dbinom", "tbinom"):
            return self.sympy.binomial(self.argument(), self.argument())
        if name == "sqrt":
            degree = self.group("[", "]") if self.peek() == "[" else self.sympy.Integer(2)
            return self.sympy.root(self.argument(), degree)
        if token.startswith("\\") and name in _FUNCTIONS:
            return self.function(name)
        raise ExpressionError(f"{token!r} is not known.")

    def function(self, name: str) -> Any:
        r"""Read what follows a function's name: a base or a power, then its argument, as in ``\sin^2 2x``."""
        base = exponent = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.argument()
        if self.peek() in ("^", "**"):
            self.take()
            exponent = self.argument() if self.peek() in ("{", "(") else self.signed()
        if exponent == -1 and name in _INVERSES:
            name, exponent = _INVERSES[name], None
        value = getattr(self.sympy, _SYMPY_NAMES.get(name, name))(self.operand())
        value = value if base is None else value / self.sympy.log(base)
        return value if exponent is None else value**exponent

    def operand(self) -> Any:
        r"""Read a function's argument: brackets, or factors up to the next function, as in ``\sin 2x\cos x``."""
        if self.peek() == "(":
            return self.group("(", ")")
        value = self.signed()
        while True:
            token = self.peek()
            is_function = token is not None and token.lstrip("\\") in _FUNCTIONS
            if is_function or token == "(" or not self.starts_factor(token):
                return value
            value = value * self.power()

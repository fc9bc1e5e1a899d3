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

_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|\\([A-Za-z]+)|([A-Za-z])|(\*\*|[-+*/^(){}\[\]!=,]))")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "exp", "ln", "log", "sqrt"}
_SYMPY_NAMES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log"}
_SPACES = {"left", "right", "displaystyle", "quad", "qquad"}


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
    """Tell whether two expressions are equal for all values of their variables; false if either cannot be read.

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
    tokens, place = [], 0
    text = text.strip()
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
            if token in ("*", "\\cdot", "\\times"):
                self.take()
                value = value * self.signed()
            elif token in ("/", "\\div"):
                self.take()
                value = value / self.signed()
            elif token is not None and (token[0].isalnum() or token in "({" or token[0] == "\\"):
                value = value * self.power()
            else:
                return value

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
        if token[0].isdigit() or token[0] == ".":
            return self.sympy.Rational(token)
        if token.isalpha():
            return self.sympy.Symbol(token)
        return self.command(token)

    def command(self, token: str) -> Any:
        name = token.lstrip("\\")
        if token == "\\pi":
            return self.sympy.pi
        if token in ("\\frac", "\\dfrac", "\\tfrac"):
            return self.argument() / self.argument()
        if token == "\\sqrt":
            degree = self.group("[", "]") if self.peek() == "[" else self.sympy.Integer(2)
            return self.sympy.root(self.argument(), degree)
        if token.startswith("\\") and name in _FUNCTIONS:
            argument = self.group("(", ")") if self.peek() == "(" else self.power()
            return getattr(self.sympy, _SYMPY_NAMES.get(name, name))(argument)
        raise ExpressionError(f"{token!r} is not known.")

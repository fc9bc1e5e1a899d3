"""Fields of a request's JSON body, read one by one with their types and ranges; an unknown field is refused."""

import math
import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lightning_lm.errors import LightningLMError

__all__ = ["Fields", "RequestError", "is_ids", "shown"]

T = TypeVar("T")

_MOST_STOPS, _LONGEST_STOP = 16, 1000
_LARGEST = sys.float_info.max
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 80, 80, 80


class RequestError(LightningLMError, ValueError):
    """A request that cannot be answered, in the terms of OpenAI's error objects.

    Args:
        message: Received value, expected one and remedy.
        param: Field of the body.
        status: HTTP status.
        code: Short name of the error for programs.
    """

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = "invalid_value"
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class Fields:
    """The fields of a body; each is taken out once, and ``null`` is the same as a missing one.

    Args:
        body: The parsed JSON.
    """

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise RequestError(f"The body must be a JSON object, not {type(body).__name__}.")
        self._left = {name: value for name, value in body.items() if value is not None}

    def pop(self, name: str) -> Any:
        """Return the value of a field as it came; ``None`` if it is missing."""
        return self._left.pop(name, None)

    def number(self, name: str, default: float, low: float = -math.inf, high: float = math.inf) -> float:
        """Return a finite number in a closed interval."""
        value = self._left.pop(name, default)
        valid = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared first: an integer may be too large for a float.
        if not valid or not max(low, -_LARGEST) <= value <= min(high, _LARGEST):
            raise _wrong(name, value, f"a number{_range(low, high)}")
        return float(value)

    def integer(self, name: str, default: T, low: float = -math.inf, high: float = math.inf) -> int | T:
        """Return an integer in a closed interval."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _wrong(name, value, f"an integer{_range(low, high)}")
        return value

    def flag(self, name: str) -> bool:
        """Return true or false, which is the default."""
        value = self._left.pop(name, False)
        if not isinstance(value, bool):
            raise _wrong(name, value, "true or false")
        return value

    def stops(self) -> tuple[str, ...]:
        """Return the texts of ``stop``: one, or a list."""
        value = self._left.pop("stop", [])
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise _wrong("stop", value, "a text, or a list of texts, none of them empty")
        if len(texts) > _MOST_STOPS or any(len(text) > _LONGEST_STOP for text in texts):
            raise _wrong("stop", value, f"at most {_MOST_STOPS} texts of at most {_LONGEST_STOP} characters")
        return tuple(texts)

    def ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Return a list of token ids."""
        value = self._left.pop(name, [])
        if not is_ids(value, vocab_size):
            raise _wrong(name, value, f"a list of token ids from 0 to {vocab_size - 1}")
        return tuple(value)

    def bias(self, vocab_size: int) -> dict[int, float]:
        """Return ``logit_bias``: a number from -100 to 100 for each token id."""
        value = self._left.pop("logit_bias", {})
        need = f"an object from token ids (0 to {vocab_size - 1}) to numbers from -100 to 100"
        if not isinstance(value, dict) or len(value) > 1024:
            raise _wrong("logit_bias", value, need)
        for key, number in value.items():
            valid = key.isdecimal() and key.isascii() and len(key) < 12 and int(key) < vocab_size
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if not valid or not is_number or not -100 <= number <= 100:
                raise _wrong("logit_bias", {key: number}, need)
        return {int(key): float(number) for key, number in value.items()}

    def neutral(self, values: Mapping[str, Sequence[Any]]) -> None:
        """Drop fields whose value asks for what this server does anyway; other values of them are left.

        Args:
            values: Such values of each field.
        """
        for name, usual in values.items():
            value = self._left.get(name)
            if any(type(value) is type(one) and value == one for one in usual):
                del self._left[name]

    def ignore(self, *names: str) -> None:
        """Drop fields that do not change a completion."""
        for name in names:
            self._left.pop(name, None)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Refuse fields that ask for something that this server does not do.

        Args:
            reasons: Reason and remedy of each field. Values that ask for nothing (empty, false, zero) pass.
        """
        for name, reason in reasons.items():
            value = self._left.pop(name, None)
            if value:
                raise RequestError(f"{name}={shown(value)} is not supported: {reason}", param=name, code="unsupported")

    def end(self) -> None:
        """Refuse the fields that are left."""
        if self._left:
            name = next(iter(self._left))
            raise RequestError(
                f"The field {name!r:.80} is not known (its value is {shown(self._left[name])}). Leave it out: this "
                "server ignores no field that may change a completion.",
                param=name,
                code="unknown_field",
            )


def is_ids(value: Any, vocab_size: int) -> bool:
    """Return whether a value is a list of token ids."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < vocab_size for item in value)


def _wrong(name: str, value: Any, needed: str) -> RequestError:
    return RequestError(f"{name}={shown(value)} must be {needed}.", param=name)


def shown(value: Any) -> str:
    """Return a value for an error message, cut short.

    Args:
        value: Value of a JSON body; it may be large, or nested deeply.
    """
    text = _REPR.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _range(low: float, high: float) -> str:
    if low == -math.inf and high == math.inf:
        return ""
    if high == math.inf:
        return f" of at least {low:g}"
    return f" from {low:g} to {high:g}"

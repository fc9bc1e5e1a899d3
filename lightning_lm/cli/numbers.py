"""Numbers on the command line: types of argparse that refuse a number out of range, and name the range."""

import argparse

from lightning_lm.parts import Limit

__all__ = ["COUNT", "POSITIVE", "UP_TO_ONE", "WHOLE", "Number"]

_WHOLE_BELOW = 2**63  # the largest integers of torch and NumPy


class Number:
    """The type of an argument: a number in a range.

    Args:
        limit: Range that the number must lie in.
        whole: Take integers only.
    """

    def __init__(self, limit: Limit, *, whole: bool = False) -> None:
        self._limit, self._whole = limit, whole

    def __call__(self, text: str) -> int | float:
        """Return the number in a text.

        Args:
            text: Argument as it was typed.

        Raises:
            argparse.ArgumentTypeError: If it is no number, or out of range.
        """
        try:
            number: int | float = int(text) if self._whole else float(text)
        except ValueError as error:
            kind = "whole number" if self._whole else "number"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no {kind}") from error
        if not self._limit.admits(number) or (self._whole and abs(number) >= _WHOLE_BELOW):
            raise argparse.ArgumentTypeError(f"{text[:40]} must be {self._limit.value}")
        return number


COUNT = Number(Limit.COUNT, whole=True)
POSITIVE = Number(Limit.POSITIVE)
UP_TO_ONE = Number(Limit.UP_TO_ONE)
WHOLE = Number(Limit.NON_NEGATIVE, whole=True)

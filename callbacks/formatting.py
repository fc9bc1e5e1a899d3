"""Numbers and texts as a person reads them."""

import math

__all__ = ["clock", "number", "short", "visible"]


def short(number: float) -> str:
    """Return three digits and a unit.

    Example:
        >>> short(950), short(12_345), short(5_600_000)
        ('950', '12.3k', '5.6M')
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def number(value: float) -> str:
    """Return a result with as many digits as matter.

    Example:
        >>> number(5.0803123456789), number(161.02345), number(98765.4), number(3e-05), number(12.0)
        ('5.0803', '161.02', '98,765', '3e-05', '12')
    """
    if value == int(value) if math.isfinite(value) else False:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 100 else f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """Return minutes and seconds, and hours where there are any.

    Example:
        >>> clock(83.4), clock(3723)
        ('1:23', '1:02:03')
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def visible(text: str) -> str:
    r"""Replace control characters: an untrained model's bytes must not command the terminal.

    Example:
        >>> visible("a\x1b[2J\n")
        'a�[2J\n'
    """
    return "".join(mark if mark.isprintable() or mark in "\n\t" else "\N{REPLACEMENT CHARACTER}" for mark in text)

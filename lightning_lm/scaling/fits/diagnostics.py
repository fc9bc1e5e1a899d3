"""Diagnostics of a fit, to read before trusting it."""

from typing import Literal, NamedTuple

import numpy as np

from lightning_lm.scaling.fits.points import Points

__all__ = ["Finding", "examine"]

Kind = Literal["range", "edge", "bias", "floor", "shape"]

_NARROW = 8.0
"""Sizes and data should span at least this factor; published sweeps span 100 and more."""


class Finding(NamedTuple):
    """One remark."""

    kind: Kind
    message: str


def examine(points: Points) -> tuple[Finding, ...]:
    """Return what is wrong with the plan of the runs: ranges that are too narrow, sizes and data that go together.

    Args:
        points: The runs that were fitted.
    """
    findings = []
    for name in ("parameters", "tokens", "flops"):
        span = float(getattr(points, name).max() / getattr(points, name).min())
        if span < _NARROW:
            message = f"{name} span only a factor of {span:.1f}; exponents from less than {_NARROW:g} are guesses."
            findings.append(Finding("range", message))
    related = np.corrcoef(np.log(points.parameters), np.log(points.tokens))[0, 1]
    if abs(related) > 0.95:
        message = (
            f"sizes and tokens go together (correlation {related:+.2f}), so the law cannot tell their effects apart."
        )
        findings.append(Finding("shape", message))
    return tuple(findings)

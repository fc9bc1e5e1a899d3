"""The one switch of all digests."""

import os

__all__ = ["SWITCH", "verifies"]

SWITCH = "LIGHTNING_LM_VERIFY"
"""Environment variable; ``0`` reads files without a look at their digests."""


def verifies() -> bool:
    """Return whether digests are compared when files are read."""
    return os.environ.get(SWITCH, "1") != "0"

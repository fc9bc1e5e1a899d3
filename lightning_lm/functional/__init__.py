"""Pure tensor maths: every formula of the package, tested against a float64 oracle. Nothing here knows Lightning."""

from lightning_lm.functional.attention import Documents, causal_attention
from lightning_lm.functional.rope import rope_frequencies, rope_table, rotate

__all__ = [
    "Documents",
    "causal_attention",
    "rope_frequencies",
    "rope_table",
    "rotate",
]

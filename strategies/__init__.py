"""Strategies for a stock Trainer."""

if __name__ != "lightning_lm.strategies":
    raise ImportError(f"This folder was imported as {__name__!r}; import it as 'lightning_lm.strategies'.")

from lightning_lm.strategies.checkpoint import AtomicCheckpointIO

__all__ = ["AtomicCheckpointIO"]

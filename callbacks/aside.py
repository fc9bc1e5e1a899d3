"""Using a model between two training steps without leaving a trace: modes, random numbers and measured times stay.

What a callback of observation runs beside the training, such as a user's ``forward`` on other inputs, may fail without
ending the run: `FAILURES` lists the errors that user code raises then.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import nn

from lightning_lm.errors import LightningLMError

__all__ = ["FAILURES", "clocks_stopped", "reason_of", "set_aside"]

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    MisconfigurationException,
    LightningLMError,
)
"""Errors of code that was not written for the way in which an observer runs it."""


def reason_of(error: BaseException) -> str:
    """Return the kind and the first line of an error, for a warning."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


@contextmanager
def clocks_stopped(trainer: Trainer) -> Iterator[None]:
    """Keep what is done meanwhile out of the speed of training that other callbacks measure.

    Args:
        trainer: Those of its callbacks that have ``clock_stopped(trainer)`` are told.
    """
    with ExitStack() as clocks:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "clock_stopped"):
                clocks.enter_context(callback.clock_stopped(trainer))
        yield


@contextmanager
def set_aside(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Switch a module to evaluation, and give back its modes and the random state afterwards, bit for bit.

    Args:
        module: Each of its submodules gets back its own mode, so a frozen part stays in evaluation.
        device: Compute device; the global generators of this device and of the CPU are restored afterwards.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for part, training in modes.items():
            part.training = training

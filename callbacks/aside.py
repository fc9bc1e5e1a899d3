"""Using a model between two training steps without leaving a trace: modes, random numbers and measured times stay.

What a callback of observation runs beside the training, such as a user's ``forward`` on other inputs, may fail without
ending the run: it is an `Attempt`.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import nn

from lightning_lm.errors import LightningLMError

__all__ = ["Attempt", "clocks_stopped", "reason_of", "set_aside"]

_FAILURES = (
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
_NOT_OF_USERS = frozenset({*sys.stdlib_module_names, "lightning", "lightning_lm"})
"""Packages whose other errors say something else: the end of an iteration or of a search, a fault of this package."""


class Attempt:
    """Context in which user code may fail: it ends there, and the error is kept.

    Errors are those that such code raises, and those of classes that users and their packages define, which nobody can
    list. Interrupts, exits and the rest of Python's own errors go on.

    Attributes:
        error: What was raised, or ``None``.

    Example:
        >>> with Attempt() as attempt:
        ...     {}["missing"]
        >>> reason_of(attempt.error)
        "KeyError: 'missing'"
    """

    error: BaseException | None = None

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        if not (isinstance(error, _FAILURES) or _is_of_users(error)):
            return False
        self.error = error
        return True


def _is_of_users(error: BaseException | None) -> bool:
    return isinstance(error, Exception) and type(error).__module__.partition(".")[0] not in _NOT_OF_USERS


def reason_of(error: BaseException | None) -> str:
    """Return the kind and the first line of an error, for a warning; without one, another rank had it."""
    if error is None:
        return "on another rank"
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

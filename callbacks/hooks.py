"""Building blocks of observing callbacks: hooks that cost nothing when unused, evaluation without side effects.

A model is used between two training steps, and its modes, random state and measured times are as before
(`without_side_effects`, `clocks_stopped`). User code that runs beside the training, such as a ``forward`` on other
inputs, may fail without ending the run (`Attempt`). Metrics go straight to the loggers, once a logging interval
(`emit`).
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_lm.errors import LightningLMError

__all__ = ["Attempt", "LeanHooks", "LogInterval", "clocks_stopped", "emit", "reason_of", "without_side_effects"]

_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
)
"""The hooks that Lightning calls for every batch."""


class LeanHooks:
    """Mixin, first among the bases: a batch hook that a callback leaves empty is not called.

    Lightning calls six hooks of every callback at each step and wraps each call in a profiler's context, which for a
    small model costs more than what the callbacks here do. It passes over a hook that is not callable, so the empty
    ones become ``None``. A subclass may define any of them, and then has no ``super()`` to call there.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _HOOKS:
            if getattr(cls, name) is getattr(Callback, name):
                setattr(cls, name, None)


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
def without_side_effects(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluate a module between training steps: afterwards modes and random state are as before, bit for bit.

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


class LogInterval:
    """Detector of optimizer steps that end a logging interval, also under gradient accumulation."""

    def __init__(self) -> None:
        self.step = 0

    def reset(self, trainer: Trainer) -> None:
        """Start at the trainer's present step."""
        self.step = trainer.global_step

    def stepped(self, trainer: Trainer) -> bool:
        """Return whether the optimizer has stepped since the last call."""
        before, self.step = self.step, trainer.global_step
        return self.step != before

    def ends(self, trainer: Trainer) -> bool:
        """Return whether the trainer's loggers record the current step."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and self.step % every == 0


def emit(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Hand numbers to every logger, and to ``trainer.callback_metrics`` for whoever watches them.

    Args:
        trainer: The running trainer; its ``global_step`` is the step that is recorded.
        metrics: Names and values. On ranks other than 0 the loggers write nothing.
    """
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)

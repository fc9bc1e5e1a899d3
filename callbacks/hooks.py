"""Callbacks that pay only for the hooks they use."""

from typing import Any

from lightning.pytorch import Callback

__all__ = ["LeanHooks"]

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

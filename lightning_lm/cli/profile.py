"""``lightning-lm profile``: where the time of a training step goes, for a recipe as it is."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer

from lightning_lm.callbacks import KernelSwap, LoRA, Profile
from lightning_lm.cli.trainer import CommandLine, prepare, print_class_help

__all__ = ["run"]

_KEPT = (KernelSwap, LoRA, Profile)
"""Callbacks that change what is computed; the others would only cost time."""


def run(verb: str, words: Sequence[str]) -> None:  # noqa: ARG001
    """Train for a few batches, print the table and write the trace; nothing is logged or saved.

    Args:
        verb: ``profile``.
        words: The command line after the verb: that of ``fit``.

    Raises:
        UsageError: If a key, a class or a value on the command line or in the YAML cannot be used.
    """
    prepare()
    if not print_class_help("fit", words):
        _ProfileCommandLine("fit", words)


class _ProfileCommandLine(CommandLine):
    """The command line of ``fit`` with a Trainer that stops once all is measured."""

    def before_instantiate_classes(self) -> None:
        """Write no configuration beside a run that leaves none, and claim no folder."""
        super().before_instantiate_classes()
        self.config[self.subcommand]["trainer"]["logger"] = False
        self.save_config_callback = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build a Trainer that measures, and does nothing else that takes time."""
        settings = self.config_init[self.subcommand]["trainer"]
        callbacks = settings.get("callbacks") or []
        callbacks = [callback for callback in callbacks if isinstance(callback, _KEPT)]
        profile = next((callback for callback in callbacks if isinstance(callback, Profile)), None)
        if profile is None:
            callbacks.append(profile := Profile())
        quiet = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
        steps = -(-profile.num_batches // settings["accumulate_grad_batches"])
        return super().instantiate_trainer(callbacks=callbacks, max_steps=steps, **quiet, **kwargs)

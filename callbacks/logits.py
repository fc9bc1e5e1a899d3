"""Next-token logits of any module, however it hands them out."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lm.errors import ConfigurationError

__all__ = ["field_of", "logits_in", "logits_of"]


def field_of(outputs: Any, name: str) -> Any:
    """Return what a step's outputs hold under a name, as a key or as an attribute; ``None`` if nothing."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def logits_in(outputs: Any) -> Tensor | None:
    """Return the logits [batch, seq, vocab] that are, or are in, an output; ``None`` if there are none."""
    logits = outputs if isinstance(outputs, Tensor) else field_of(outputs, "logits")
    return logits if isinstance(logits, Tensor) and logits.ndim == 3 else None


def logits_of(trainer: Trainer, pl_module: LightningModule, input_ids: Tensor) -> Tensor:
    """Return what a module's ``forward(input_ids)`` predicts, in the trainer's precision.

    Raises:
        ConfigurationError: If it returns no logits.
    """
    with trainer.precision_plugin.val_step_context():
        outputs = pl_module(input_ids)
    logits = logits_in(outputs)
    if logits is None:
        raise ConfigurationError(
            f"{type(pl_module).__name__}(input_ids) returned {type(outputs).__name__}, not logits [batch, seq, vocab]. "
            "Let forward or validation_step return the logits, or a mapping with 'logits'."
        )
    return logits

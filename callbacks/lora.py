"""Low-rank adapters of ``peft`` on any module's model, merged into its weights for export."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models import (
    AdapterPart,
    Adapters,
    PretrainedAdapters,
    Transformer,
    TransformersModel,
    describe_adapters,
    merge_adapters,
    save_adapters,
)
from lightning_lm.models.grow import trains_vocabulary
from lightning_lm.models.lora import require_same_adapters
from lightning_lm.modules import load_model
from lightning_lm.modules.checkpoint import ADAPTERS, reading, saved_adapters
from lightning_lm.protocols import Tokenizer

__all__ = [
    "Adapters",
    "LoRA",
    "PretrainedAdapters",
    "has_adapters",
    "load_merged",
    "merge_adapters",
    "save_adapters",
]


class LoRA(Callback):
    """Trains low-rank adapters in place of a model's weights.

    Adapters are added as soon as the module has built its model, before the optimizer is made, so that it gets only
    theirs. Checkpoints have weights and adapters, resume as usual, and load wherever a checkpoint does; a run that
    starts from one merges the adapters. `merge_adapters` returns the merged model of a module in memory, ready to be
    exported. With ``reference=AdapterReference()`` the model without adapters is the reference of preference
    optimization.

    Args:
        adapters: Adapters to add: their targets, rank and scale.
        attribute: Name of the module's attribute that is the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import Adapters, LoRA
        >>> callbacks = [LoRA(Adapters(rank=8))]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    def __init__(self, adapters: AdapterPart = Adapters(), *, attribute: str = "model") -> None:
        self.adapters, self._attribute = adapters, attribute

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module build its model, and put the adapters on, once.

        Raises:
            ConfigurationError: If the module has no such model, or it no such matrices, or other adapters already.
        """
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(trainer.strategy.tensor_init_context())
            contexts.enter_context(trainer.strategy.model_sharded_context())
            contexts.enter_context(trainer.precision_plugin.module_init_context())
            pl_module.configure_model()
            model = getattr(pl_module, self._attribute, None)
            if not isinstance(model, nn.Module):
                raise ConfigurationError(
                    f"{type(pl_module).__name__} has no model in its attribute {self._attribute!r}; give "
                    "LoRA(attribute=...) the name of the attribute that holds it."
                )
            if not require_same_adapters(model, self.adapters):
                self.adapters.attach(model)
                _require_new_rows(pl_module, model)
                self._report(model)

    def _report(self, model: nn.Module) -> None:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        whole = sum(parameter.numel() for parameter in model.parameters())
        rank_zero_info(f"Adapters: {trained:,} of {whole:,} parameters are trained ({trained / whole:.2%}).")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Describe the adapters in the checkpoint."""
        checkpoint[ADAPTERS] = describe_adapters(getattr(pl_module, self._attribute))


def _require_new_rows(module: LightningModule, model: nn.Module) -> None:
    """Refuse to freeze the rows of tokens that the model gets for this run: they are all the same at first."""
    new_tokens = getattr(getattr(module, "model_config", None), "new_tokens", ())
    if new_tokens and isinstance(model, Transformer | TransformersModel) and not trains_vocabulary(model):
        names = "[embed, head]" if isinstance(model, Transformer) else "[embed_tokens, lm_head]"
        raise ConfigurationError(
            f"new_tokens={tuple(new_tokens)} get rows in embedding and output layer, and the adapters would leave them "
            f'untrained. Train both layers whole: --trainer.callbacks.adapters.trained "{names}".'
        )


def has_adapters(path: Path | str) -> bool:
    """Return whether a checkpoint has adapters of ``peft``; its weights are not read.

    Args:
        path: A ``.ckpt`` that Lightning wrote.

    Raises:
        CheckpointError: If the file is truncated, is no checkpoint, or holds more than tensors and plain data.
        FileNotFoundError: If there is no such file.
    """
    with reading(path):
        return saved_adapters(torch.load(path, map_location="cpu", weights_only=True, mmap=True)) is not None


def load_merged(path: Path | str) -> tuple[nn.Module, Tokenizer | None]:
    """Return the model of a checkpoint with its adapters merged, ready for use, and its tokenizer if it carries one.

    `lightning_lm.modules.load_model` does the same, and reads checkpoints without adapters too.

    Args:
        path: A ``.ckpt`` that a module of this package wrote while `LoRA` was among the callbacks.

    Raises:
        CheckpointError: If the file is truncated or foreign, or holds no adapters.
        FileNotFoundError: If there is no such file.
    """
    if not has_adapters(path):
        raise CheckpointError(
            f"{path} holds no adapters. It must be written while LoRA is among the callbacks; load_model reads "
            "checkpoints without adapters."
        )
    return load_model(path)

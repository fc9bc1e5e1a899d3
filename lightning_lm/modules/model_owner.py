"""A module that owns a model: given, or built from its config once the tokenizer is known."""

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lm._lightning import trainer_of, warn_of_kept_values
from lightning_lm.errors import ConfigurationError
from lightning_lm.models import ModelConfig, as_language_model, attach_adapters
from lightning_lm.modules.activation_checkpointing import ActivationCheckpointing, compile_blocks, recompute_blocks
from lightning_lm.modules.as_trained import with_trained_template
from lightning_lm.modules.checkpoint import load_config, saved_adapters
from lightning_lm.modules.metrics import MeasuredModule
from lightning_lm.parts import Part

__all__ = ["Compile", "_ModelOwner"]

Compile = Literal["none", "blocks"]
"""Modules that `torch.compile` is applied to, in place: none, or each layer of the model."""


class _ModelOwner(MeasuredModule, abc.ABC):
    """Owns a language model under the name ``model``.

    Args:
        model: A config, built once the tokenizer is known, or a module.
        compile: Part of the model that `torch.compile` is applied to.
        activation_checkpointing: Activations that the backward pass recomputes to save memory.
    """

    predicts_next: ClassVar[bool] = True
    """True if targets are next tokens, so that the model must be causal."""

    def __init__(
        self, model: ModelConfig | nn.Module, *, compile: Compile, activation_checkpointing: ActivationCheckpointing
    ) -> None:
        super().__init__()
        warn_of_kept_values(type(self), "model")
        self.compile_what, self.activation_checkpointing = compile, activation_checkpointing
        self._configured = False
        self.model_config = model if isinstance(model, ModelConfig) else None
        if isinstance(model, nn.Module):
            self.model = as_language_model(model)

    def configure_model(self) -> None:
        """Build the model and prepare its layers, once."""
        if self._configured:
            return
        if self.model_config is not None:
            _refuse_early_copies(trainer_of(self))
            self.model = self.model_config.build(self._vocab_size())
        else:
            _check_vocabulary(self.model, self._vocab_size())
        if not self.model.training:
            self.model.train()  # what from_pretrained returns is in evaluation mode: no dropout
        _check_length(self.model, trainer_of(self), self.model_config)
        if self.predicts_next:
            _check_causal(self.model, type(self).__name__)
        self._configured = True
        recompute_blocks(self.model, self.activation_checkpointing)
        if self.compile_what == "blocks":
            compile_blocks(self.model)

    def _vocab_size(self) -> int | None:
        tokenizer = self._tokenizer()
        return None if tokenizer is None else int(tokenizer.vocab_size)

    def _datamodule(self) -> Any:
        trainer = trainer_of(self)
        return getattr(trainer, "datamodule", None)

    def _tokenizer(self) -> Any:
        return getattr(self._datamodule(), "tokenizer", None)

    def trained_tokenizer(self) -> Any:
        """Return the tokenizer with the chat template that the model is trained on; ``None`` without a tokenizer."""
        return with_trained_template(self._tokenizer(), self._datamodule())

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights; a model that was built in other processes only ("ddp_spawn", notebooks) is built here first.

        Args:
            state_dict: Weights by name.
            args: As torch has them.
            kwargs: As torch has them.
        """
        if not self._configured and self.model_config is not None:
            head = state_dict.get("model.head.weight")
            if head is not None:  # the tokenizer may have been made there too
                self.model_config = dataclasses.replace(self.model_config, vocab_size=len(head))
            _ModelOwner.configure_model(self)  # what is compared with the model is not needed any more
        return super().load_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Return the module of a checkpoint, as Lightning does.

        The model is built from its description in the file unless ``model`` is given; so is a vocabulary size that the
        given config leaves out.

        Args:
            checkpoint_path: A ``.ckpt`` file.
            args: As Lightning has them.
            kwargs: As Lightning has them, ``weights_only=True`` and the arguments of the module, such as ``model``.
        """
        if isinstance(checkpoint_path, str | Path):
            config = load_config(checkpoint_path, kwargs.get("model"))
            kwargs |= {} if config is None else {"model": config}
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def attach_saved_adapters(self, checkpoint: Mapping[str, Any]) -> None:
        """Put the adapters of a checkpoint on the model, if no callback has put any there.

        Args:
            checkpoint: Its content.

        Raises:
            ConfigurationError: If the optimizer was made before, without them.
        """
        adapters = saved_adapters(checkpoint)
        if adapters is None or hasattr(self.model, "peft_config"):
            return
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == "fit" and trainer.strategy.restore_checkpoint_after_setup:
            raise ConfigurationError(
                f"The checkpoint has adapters, and {type(trainer.strategy).__name__} has made the optimizer without "
                "them. Add the callback they were trained with: --trainer.callbacks+=LoRA."
            )
        attach_adapters(self.model, adapters)
        rank_zero_info("The adapters of the checkpoint are put on the model; only they are trained.")

    def _model_description(self) -> dict[str, Any] | None:
        model = getattr(self, "model", None)
        config = getattr(model, "description", getattr(model, "config", None))
        return config.to_dict() if isinstance(config, Part) else None


def _refuse_early_copies(trainer: Any) -> None:
    """Refuse a callback that has copied the module already, without its model."""
    if any(isinstance(callback, StochasticWeightAveraging) for callback in getattr(trainer, "callbacks", ())):
        raise ConfigurationError(
            "StochasticWeightAveraging copies the module before its model is built from the config, so it would "
            "average nothing. Give the module a built model, PretrainModule(config.build()) with the config's "
            "vocab_size set, or average with lightning_lm.callbacks.EMA."
        )


def _check_vocabulary(model: nn.Module, vocab_size: int | None) -> None:
    weight = getattr(getattr(model, "head", None), "weight", None)
    size = None if weight is None else len(weight)
    if vocab_size is not None and size is not None and size < vocab_size:
        raise ConfigurationError(
            f"The model has {size} ids, but the tokenizer has {vocab_size}. Give the data the tokenizer that the model "
            f"was made for (--data.tokenizer LoadTokenizer --data.tokenizer.path FOLDER), or a model with at least "
            f"{vocab_size} ids."
        )


def _check_causal(model: nn.Module, module: str) -> None:
    """Refuse a model whose tokens see later ones, which are its targets."""
    if not getattr(model, "is_causal", True):
        raise ConfigurationError(
            f"{module} trains on the next token, and layers of the model see it (Attention(causal=False)). Give the "
            "layers Attention(causal=True), or train with MaskedLMModule."
        )


def _check_length(model: nn.Module, trainer: Any, config: ModelConfig | None) -> None:
    rows = getattr(getattr(trainer, "datamodule", None), "context_length", None)
    limit = getattr(getattr(model, "config", None), "context_length", None)
    if isinstance(rows, int) and isinstance(limit, int) and rows > limit:
        key = "data.rows" if hasattr(trainer.datamodule, "template") else "data"
        fixed = Path(getattr(config, "checkpoint", "")).is_file()  # a .ckpt keeps its own
        longer = "" if fixed else f"--model.model.context_length {rows}, or "
        raise ConfigurationError(
            f"The data has context_length={rows}, but the model was described with context_length={limit}. Set "
            f"{longer}--{key}.context_length {limit}."
        )

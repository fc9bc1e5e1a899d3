"""Low-rank adapters of ``peft`` on any module's model, merged into its weights for export."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lm.errors import CheckpointError, ConfigurationError, MissingDependencyError
from lightning_lm.models import ModelConfig, merge_adapters, parameter_roles
from lightning_lm.modules import read_checkpoint
from lightning_lm.modules.checkpoint import ENTRY, check_weights, reading
from lightning_lm.parts import Part
from lightning_lm.protocols import Tokenizer
from lightning_lm.tokenizers import tokenizer_from_files

__all__ = ["Adapters", "LoRA", "has_adapters", "load_merged", "merge_adapters"]

_ADAPTERS = "lightning_lm_adapters"
"""Key of the description of the adapters in a checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters(Part):
    """Which matrices get an adapter, and how large: each becomes ``W + (alpha / rank) B A``, with ``B`` zero at first.

    Args:
        rank: Rows of ``A``.
        alpha: Scale of the adapter, divided by the rank (by its root with ``rank_stabilized``). Unitless.
        dropout: Probability with which a feature that the adapter reads is dropped in training.
        targets: Names, or ends of names, of linear maps; empty for every one whose role is ``matrix``.
        trained: Names of modules that are trained whole beside the adapters, for example a new output layer.
        rank_stabilized: Divide ``alpha`` by the root of the rank, so that high ranks learn as fast.

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; Kalajdzievski 2023, arXiv:2312.03732.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    rank_stabilized: bool = False

    def attach(self, model: nn.Module) -> None:
        """Put adapters on a model, in place, and freeze everything else.

        Args:
            model: Its matrices are `torch.nn.Linear`, or another kind that ``peft`` knows.

        Raises:
            ConfigurationError: If no matrix has one of the names.
            MissingDependencyError: If ``peft`` is not installed.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise MissingDependencyError("peft", "train low-rank adapters", "hf") from error
        targets = list(self.targets) or _matrices(model)
        settings = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=list(self.trained) or None,
            use_rslora=self.rank_stabilized,
        )
        try:
            inject_adapter_in_model(settings, model)
            model.train(model.training)  # the new modules begin in the mode of the model
        except ValueError as error:
            names = [name for name, child in model.named_modules() if isinstance(child, nn.Linear)]
            raise ConfigurationError(
                f"No adapter was put on targets={self.targets}: {error} Linear maps here: {', '.join(names[:8])}."
            ) from error


def _matrices(model: nn.Module) -> list[str]:
    """Return the names of the linear maps whose role is ``matrix``."""
    roles = parameter_roles(model)
    maps = [name for name, child in model.named_modules() if isinstance(child, nn.Linear)]
    return [name for name in maps if roles.get(f"{name}.weight") == "matrix"]


class LoRA(Callback):
    """Trains low-rank adapters in place of a model's weights.

    They are put on as soon as the module has built its model, before the optimizer is made, so that it only gets them.
    Checkpoints hold weights and adapters, and resume as always; `load_merged` returns the merged model of one, and
    `merge_adapters` that of a module in memory, ready to be exported. With ``reference=AdapterReference()`` the model
    without its adapters is what preference optimization compares with.

    Args:
        adapters: Which matrices, and how large.
        attribute: Where the module keeps its model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import Adapters, LoRA
        >>> callbacks = [LoRA(Adapters(rank=8))]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    def __init__(self, adapters: Adapters = Adapters(), *, attribute: str = "model") -> None:
        self.adapters, self._attribute = adapters, attribute

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module build its model, and put the adapters on, once.

        Raises:
            ConfigurationError: If the module has no such model, or it no such matrices.
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
            if not hasattr(model, "peft_config"):
                self.adapters.attach(model)
                self._report(model)

    def _report(self, model: nn.Module) -> None:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        whole = sum(parameter.numel() for parameter in model.parameters())
        rank_zero_info(f"Adapters: {trained:,} of {whole:,} parameters are trained ({trained / whole:.2%}).")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint which adapters it holds."""
        checkpoint[_ADAPTERS] = self.adapters.to_dict()


def has_adapters(path: Path | str) -> bool:
    """Tell whether a checkpoint was written while `LoRA` was among the callbacks; its weights are not read.

    Args:
        path: A ``.ckpt`` that Lightning wrote.

    Raises:
        CheckpointError: If the file is truncated, is no checkpoint, or holds more than tensors and plain data.
        FileNotFoundError: If there is no such file.
    """
    with reading(path):
        return _ADAPTERS in torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_merged(path: Path | str) -> tuple[nn.Module, Tokenizer | None]:
    """Return the model of a checkpoint with its adapters merged, ready for use, and its tokenizer if it carries one.

    Args:
        path: A ``.ckpt`` that a module of this package wrote while `LoRA` was among the callbacks.

    Raises:
        CheckpointError: If the file is truncated or foreign, or holds no adapters.
        FileNotFoundError: If there is no such file.
    """
    checkpoint = read_checkpoint(path)
    entry, adapters = checkpoint.get(ENTRY), checkpoint.get(_ADAPTERS)
    if entry is None or entry["model"] is None or adapters is None:
        raise CheckpointError(
            f"{path} holds no adapters on a model that can be built again. It must be written by a module of "
            "lightning-lm, with a model config and the callback LoRA; load_model reads checkpoints without adapters."
        )
    model = ModelConfig.from_dict(entry["model"]).build()
    Adapters.from_dict(adapters).attach(model)
    prefix = "model."
    weights = {
        name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)
    }
    check_weights(weights, model.state_dict(), source=str(path))
    model.load_state_dict(weights)
    files = entry["tokenizer"]
    return merge_adapters(model).eval(), None if files is None else tokenizer_from_files(files)

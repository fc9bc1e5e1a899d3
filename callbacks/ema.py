"""A running average of the weights, also of weights that ranks share."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_lm.callbacks.hooks import LeanHooks
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.shards import cut_like, local_part, reshard

__all__ = ["EMA"]

_ENTRY = "lightning_lm_ema"


class EMA(LeanHooks, Callback):
    """Keep an exponential moving average of the weights; validate and end with it.

    Each rank averages what it holds, so it works under every strategy; Lightning's own callback copies the module
    before a strategy shards it. Checkpoints hold the weights that are trained, and the average beside them.

    Args:
        decay: Share of the average kept at a step.
        swap_for_validation: Validate the average instead of the weights.

    Raises:
        ConfigurationError: If ``decay`` is not between 0 and 1.

    Source:
        Polyak and Juditsky 1992 (averaging); the exponential form: Tarvainen and Valpola 2017, arXiv:1703.01780.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import EMA
        >>> trainer = Trainer(callbacks=[EMA(decay=0.999)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, decay: float = 0.999, *, swap_for_validation: bool = True) -> None:
        if not 0 <= decay <= 1:
            raise ConfigurationError(f"decay={decay} is no share; give a number from 0 to 1, such as 0.999.")
        self.decay, self.swap_for_validation = decay, swap_for_validation
        self.average: dict[str, Tensor] = {}
        """Of each parameter that is trained, as this rank holds it."""
        self._loaded: Mapping[str, Tensor] | None = None
        self._last_step = -1

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights, or with the average of the checkpoint."""
        self._last_step = trainer.global_step
        self.average = {name: value.detach().clone() for name, value in _trained(pl_module).items()}
        for name, whole in (self._loaded or {}).items():
            local_part(self.average[name]).copy_(cut_like(whole, self.average[name]))
        self._loaded = None

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after each optimizer step."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            weights = [local_part(value.detach()) for value in _trained(pl_module).values()]
            torch._foreach_lerp_([local_part(value) for value in self.average.values()], weights, 1 - self.decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in the place of the weights."""
        if self.swap_for_validation:
            self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        if self.swap_for_validation:
            self._swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End with the average; the weights are dropped."""
        self._swap(pl_module)
        self.average = {}

    @torch.no_grad()
    def _swap(self, module: LightningModule) -> None:
        weights = _trained(module)
        for name, average in self.average.items():
            mine, other = local_part(weights[name].detach()), local_part(average)
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the average."""
        if self.average:
            checkpoint[_ENTRY] = dict(self.average)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the average up when training starts."""
        self._loaded = checkpoint.get(_ENTRY)


def _trained(module: LightningModule) -> dict[str, Tensor]:
    reshard(module)  # another callback may have run the model
    return {name: value for name, value in module.named_parameters() if value.requires_grad}

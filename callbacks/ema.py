"""A running average of the weights, also of sharded weights."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lm.callbacks.hooks import LeanHooks
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.dtensor import cut_like, local_part, reshard

__all__ = ["EMA"]

_ENTRY = "lightning_lm_ema"
_FIRST_DECAY = 0.9


class EMA(LeanHooks, Callback):
    """Keep an exponential moving average of the weights; validate and end with it.

    Each rank averages its own shards, so it works under every strategy; Lightning's own callback copies the module
    before a strategy shards it. Checkpoints have the weights that are trained, and the average beside them, whenever
    they are written: also during a validation, at the end of the fit and after it. ``Trainer.validate`` and
    ``Trainer.test`` of such a checkpoint measure the average again.

    Args:
        decay: Weight of the old average at each step. Unitless.
        swap_for_validation: Validate the average instead of the weights.
        warmup: Average over fewer steps at first, so that the initial weights do not outweigh the trained ones in a
            run shorter than ``1 / (1 - decay)`` steps: the decay of step ``n`` is at most ``(1 + n) / (10 + n)``, or
            0.9 where that is more.

    Raises:
        ConfigurationError: If ``decay`` is not between 0 and 1.

    Source:
        Polyak and Juditsky 1992 (averaging); the exponential form: Tarvainen and Valpola 2017, arXiv:1703.01780.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import EMA
        >>> trainer = Trainer(callbacks=[EMA(decay=0.999)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, decay: float = 0.999, *, swap_for_validation: bool = True, warmup: bool = True) -> None:
        if not 0 <= decay <= 1:
            raise ConfigurationError(f"decay={decay} is no fraction; give a number from 0 to 1, such as 0.999.")
        self.decay, self.swap_for_validation, self._warmup = decay, swap_for_validation, warmup
        self.average: dict[str, Tensor] = {}
        """The average of each parameter that is trained, this rank's shard; the weights while they are swapped."""
        self._loaded: Mapping[str, Tensor] | None = None
        self._num_averaged = 0
        self._last_step = -1
        self._swapped: weakref.ref[LightningModule] | None = None
        """The module that has the average in the place of its weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps in the average."""
        return {"num_averaged": self._num_averaged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the number of steps in the average."""
        self._num_averaged = state_dict["num_averaged"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run; a Trainer that resumes gets its weights back first."""
        if stage != "fit":
            return
        if trainer.global_step:
            self._put_back(pl_module)
        else:
            self._forget()
            self._num_averaged = 0

    def _forget(self) -> None:
        self.average, self._swapped = {}, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights, or with the average of the checkpoint."""
        self._last_step = trainer.global_step
        self._begin(pl_module)

    @torch.no_grad()
    def _begin(self, pl_module: LightningModule) -> None:
        for name, value in _trained(pl_module).items():
            if name not in self.average:
                self.average[name] = value.detach().clone()
        for name, whole in (self._loaded or {}).items():
            if name in self.average:
                local_part(self.average[name]).copy_(cut_like(whole, self.average[name]))
        self._loaded = None

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after each optimizer step; parameters unfrozen since then start with their present weights."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self._num_averaged += 1
        weights = _trained(pl_module)
        if weights.keys() != self.average.keys():
            self.average = {name: self.average.get(name, value.detach().clone()) for name, value in weights.items()}
        averages = [local_part(self.average[name]) for name in weights]
        torch._foreach_lerp_(averages, [local_part(value.detach()) for value in weights.values()], 1 - self._decay())

    def _decay(self) -> float:
        n = self._num_averaged
        return min(self.decay, max(_FIRST_DECAY, (1 + n) / (10 + n))) if self._warmup else self.decay

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in the place of the weights."""
        self._measure_average(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        if trainer.state.fn == "fit":
            self._put_back(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in the place of the weights."""
        self._measure_average(trainer, pl_module)

    def _measure_average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.swap_for_validation:
            return
        if trainer.state.fn != "fit" and self._loaded:  # a checkpoint that is only measured
            self._forget()
            self._begin(pl_module)
        self._put_average(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End with the average, once every callback has saved and measured the weights."""
        self._put_average(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the weights in the module."""
        self._put_back(pl_module)

    def _put_average(self, pl_module: LightningModule) -> None:
        if self.average and self._swapped is None:
            self._exchange(pl_module)
            self._swapped = weakref.ref(pl_module)

    def _put_back(self, pl_module: LightningModule) -> None:
        if self._swapped is not None and self._swapped() is pl_module:
            self._exchange(pl_module)
            self._swapped = None

    @torch.no_grad()
    def _exchange(self, module: LightningModule) -> None:
        weights = _parameters(module)
        for name, average in self.average.items():
            mine, other = local_part(weights[name].detach()), local_part(average)
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)

    @torch.no_grad()
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the average; a checkpoint has the weights that are trained also while the average is in their place."""
        if not self.average:
            return
        if self._swapped is None:
            checkpoint[_ENTRY] = dict(self.average)
            return
        parameters = _parameters(pl_module)
        checkpoint[_ENTRY] = {name: parameters[name].detach().clone() for name in self.average}
        names = {id(parameters[name]): name for name in self.average}
        for alias, parameter in pl_module.named_parameters(remove_duplicate=False):
            name = names.get(id(parameter))
            if name is not None:
                _replace(checkpoint["state_dict"], alias, self.average[name])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the average up when training starts."""
        self._loaded = checkpoint.get(_ENTRY)
        if self._loaded and not self._num_averaged:  # written before the steps were counted
            self._num_averaged = checkpoint["global_step"]


def _trained(module: LightningModule) -> dict[str, Tensor]:
    return {name: value for name, value in _parameters(module).items() if value.requires_grad}


def _parameters(module: LightningModule) -> dict[str, Tensor]:
    reshard(module)  # another callback may have run the model
    return dict(module.named_parameters())


def _replace(state: dict[str, Any], name: str, value: Tensor) -> None:
    """Put a weight into a state dict in the form that the strategy chose: whole or sharded. Collective."""
    if isinstance(value, DTensor) and not isinstance(state.get(name), DTensor):
        value = value.full_tensor()
    if name in state:
        state[name] = value.detach().clone().to(state[name].device)

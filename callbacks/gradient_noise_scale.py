"""Gradient noise scale, measured during training: would a larger batch help?"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lightning_lm.callbacks.batches import num_predictions
from lightning_lm.callbacks.hooks import LeanHooks, LogInterval, emit
from lightning_lm.distributed import data_ranks
from lightning_lm.errors import ConfigurationError
from lightning_lm.scaling.critical_batch import noise_moments

__all__ = ["GradientNoiseScale"]


class GradientNoiseScale(LeanHooks, Callback):
    """Log ``noise/batch_size``: batches far below it waste steps, batches far above it waste examples.

    The first micro-batch of a step is a small batch inside a large one, and both norms can be read without a copy of
    any gradient. So the trainer must accumulate at least two micro-batches, or there must be several ranks: then each
    rank's gradient is measured before it is averaged with the others'. Two estimates are averaged over steps,
    ``noise/signal`` (squared norm of the true gradient) and ``noise/trace`` (of the covariance of one example), and
    then divided: averaging ratios would overestimate by a factor of 1.3 to 4. Both have the unit of the accumulated
    gradients squared, which cancels in the ratio. The batch size is in tokens if batches have ``input_ids``, else in
    rows. On several ranks each rank's micro-batch is the small batch, so it must have whole gradients: use ``ddp`` or
    ``zero1``.

    Args:
        memory: Decay of the averages at each step; 0.99 averages over about a hundred steps. Unitless.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import GradientNoiseScale
        >>> callbacks = [GradientNoiseScale()]
        >>> trainer = Trainer(callbacks=callbacks, accumulate_grad_batches=4, logger=False, enable_checkpointing=False)

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A.
    """

    def __init__(self, *, memory: float = 0.99) -> None:
        if not 0 <= memory <= 1:
            raise ConfigurationError(f"memory={memory} is no share; use 0.99, or 1.0 to average over the whole run.")
        self._memory = memory
        self._interval = LogInterval()
        self._small = self._big = 0.0
        self._micro_batches = 0
        self._small_norm: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor, float, float]] = []
        self._own_norms: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []
        self._signal = self._trace = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return {"signal": self._signal, "trace": self._trace}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the averages."""
        self._signal, self._trace = state_dict["signal"], state_dict["trace"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a small batch inside the large one, and that both gradients can be read.

        Raises:
            ConfigurationError: If every step has one micro-batch in all, or the gradients are sharded.
        """
        if trainer.world_size > 1 and not isinstance(trainer.strategy.model, DistributedDataParallel):
            raise ConfigurationError(
                "GradientNoiseScale reads the whole gradient of a micro-batch, and with "
                f"{type(trainer.strategy).__name__} no rank has it. Use the strategy ddp or zero1, or one device."
            )
        if trainer.accumulate_grad_batches < 2:
            if data_ranks(trainer) < 2:
                raise ConfigurationError(
                    "GradientNoiseScale compares a micro-batch with its step, and here accumulate_grad_batches="
                    f"{trainer.accumulate_grad_batches} on one device makes them the same. Set it to 2 or more, with "
                    "micro-batches as much smaller, or train with ddp on two devices or more."
                )
            trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
            self._hooks = [parameter.register_hook(self._measure_own) for parameter in trained]
        self._interval.reset(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the parameters as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the parameters as they were."""
        self.on_train_end(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count what is in the batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._small = self._big = 0.0
            self._micro_batches = 0
        size = float(_size(batch))
        self._small = self._small or size
        self._big += size * data_ranks(trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the norm after the first micro-batch, and after the last: both before the gradients are rescaled."""
        self._micro_batches += 1
        if self._hooks:
            own = torch.stack(self._own_norms).square().sum()
            self._own_norms.clear()
            self._waiting.append((own, _norm_sq(pl_module), self._small, self._big))
        elif self._micro_batches == 1:
            self._small_norm = _norm_sq(pl_module)
        elif self._micro_batches == trainer.accumulate_grad_batches and self._small_norm is not None:
            self._waiting.append((self._small_norm, _norm_sq(pl_module), self._small, self._big))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average, and log where an interval ends; only then is a device waited for."""
        if self._interval.stepped(trainer) and self._interval.ends(trainer):
            self._average(data_ranks(trainer))
            if self._signal > 0:
                metrics = {"noise/batch_size": self._trace / self._signal}
                emit(trainer, {**metrics, "noise/signal": self._signal, "noise/trace": self._trace})

    def _measure_own(self, gradient: Tensor) -> None:
        """Hooks of tensors run before DDP sees a gradient: this is the rank's own."""
        self._own_norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

    def _average(self, num_ranks: int) -> None:
        for small_norm, big_norm, small, big in self._waiting:
            scale = big / (small * num_ranks)  # gradients are sums over micro-batches and means over ranks
            moments = noise_moments(float(small_norm) * scale**2, float(big_norm), small=small, big=big)
            self._signal = self._memory * self._signal + (1 - self._memory) * moments.signal
            self._trace = self._memory * self._trace + (1 - self._memory) * moments.noise
        self._waiting.clear()


def _size(batch: Any) -> int:
    tokens = num_predictions(batch)
    if tokens:
        return tokens
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    tensor = next((value for value in values if isinstance(value, Tensor)), None)
    return 1 if tensor is None or not tensor.dim() else len(tensor)


def _norm_sq(module: torch.nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norms = torch.nn.utils.get_total_norm(gradients)
    return norms.detach().float() ** 2

"""Mean training loss of any module since it was last read, from the module's own steps.

Values in ``trainer.callback_metrics`` are not used for a user's module: a name such as ``train_loss`` may have the
mean of the epoch before, the value of a rank or of one batch. Only an `LMModule`, whose steps return scaled sums, is
asked for the mean over target tokens that it logs itself.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lm.callbacks.batches import field_of
from lightning_lm.functional.dtypes import accumulation_dtype, to_accumulate
from lightning_lm.modules import LMModule

__all__ = ["TrainingLoss", "loss_of_step"]


def loss_of_step(trainer: Trainer, pl_module: LightningModule, outputs: Any) -> Tensor | None:
    """Return the loss of a micro-batch as ``training_step`` returned it; ``None`` if it returned none.

    In automatic optimization Lightning hands out the loss divided by ``accumulate_grad_batches``.

    Args:
        trainer: The running trainer.
        pl_module: The module in training; of an `LMModule` the step alone does not give the loss.
        outputs: The argument of ``on_train_batch_end``.
    """
    loss = field_of(outputs, "loss")
    if isinstance(pl_module, LMModule) or not isinstance(loss, Tensor) or not loss.numel():
        return None
    mean = to_accumulate(loss.detach()).mean()
    return mean * trainer.accumulate_grad_batches if pl_module.automatic_optimization else mean


class TrainingLoss:
    """Adds up the losses of micro-batches on their device; nothing waits for it until the mean is read."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def clear(self) -> None:
        """Forget all losses."""
        self._sum, self._count = None, 0

    def add(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        """Add the loss of a micro-batch, if the step returned one."""
        loss = loss_of_step(trainer, pl_module, outputs)
        if loss is not None:
            self._sum = loss if self._sum is None else self._sum + loss
            self._count += 1

    def read(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        """Return the mean over ranks and micro-batches and start again. Collective: call on all ranks."""
        if isinstance(pl_module, LMModule):
            own = trainer.callback_metrics.get("train/loss")
            return None if own is None else float(own)
        total, count = self._sum, self._count
        self.clear()
        device = trainer.strategy.root_device
        pair = (
            torch.zeros(2, device=device, dtype=accumulation_dtype(device))
            if total is None
            else torch.stack([total, total.new_tensor(count)])
        )
        loss_sum, num_losses = torch.as_tensor(trainer.strategy.reduce(pair, reduce_op="sum")).tolist()
        return loss_sum / num_losses if num_losses else None

"""Non-finite losses, gradients and weights: seen without waiting for the device at each step, and never saved."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lm.errors import DivergenceError
from lightning_lm.functional.dtensor import local_part, reshard

__all__ = ["DivergenceWatch", "require_finite_weights"]

_REMEDY = (
    "The run stops, and no checkpoint is written from here on: resume from the last one. To skip such steps, set "
    "skip=NonFinite() (--model.skip NonFinite); otherwise lower the learning rate or look at the data of that step."
)


class DivergenceWatch:
    """Notes the first step whose loss or gradient norm was not finite, on the device.

    Reading it waits for the device, so that is done at the log interval, before a checkpoint and at the end only.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def add(self, step: int, loss: Tensor, grad_norm: Tensor | None) -> None:
        """Look at one optimizer step.

        Args:
            step: Index of the step, from 1.
            loss: Sum over all ranks, a scalar.
            grad_norm: Norm over all ranks, a scalar; ``None`` if it was not measured.
        """
        values = torch.stack([loss, loss if grad_norm is None else grad_norm.to(loss)])
        found = torch.where(values.isfinite(), torch.inf, float(step)).float()
        self._first = found if self._first is None else torch.minimum(self._first, found)

    def require_finite(self, trainer: Trainer) -> None:
        """Stop the run if a step was not finite. Collective: call on all ranks.

        Args:
            trainer: Its ranks agree: those of a tensor-parallel group each have the loss for themselves.

        Raises:
            DivergenceError: On all ranks, with the step.
        """
        if self._first is None:
            return
        loss, grad_norm = self._first.tolist()
        if trainer.strategy.reduce_boolean_decision(min(loss, grad_norm) == torch.inf, all=True):
            return
        if min(loss, grad_norm) == torch.inf:
            raise DivergenceError(f"A loss or gradient norm of another rank is not finite. {_REMEDY}")
        name, step = ("loss", loss) if loss <= grad_norm else ("gradient norm", grad_norm)
        raise DivergenceError(f"The {name} of step {step:.0f} is not finite. {_REMEDY}")


def require_finite_weights(trainer: Trainer, module: LightningModule) -> None:
    """Stop the run if a weight that is trained is not finite. Collective: call on all ranks.

    Args:
        trainer: The module's trainer.
        module: Any module, sharded or not.

    Raises:
        DivergenceError: On all ranks, with the names of some weights on the rank that has them.
    """
    reshard(module)  # the shards, not what a validation has gathered
    trained = {name: local_part(weight.detach()) for name, weight in module.named_parameters() if weight.requires_grad}
    trained = {name: weight for name, weight in trained.items() if weight.is_floating_point() and weight.numel()}
    sizes = torch._foreach_norm(list(trained.values()), float("inf")) if trained else []
    finite = not sizes or bool(torch.stack([size.float().to(sizes[0].device) for size in sizes]).isfinite().all())
    if trainer.strategy.reduce_boolean_decision(finite, all=True):
        return
    names = [name for name, size in zip(trained, sizes, strict=True) if not size.isfinite()]
    where = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    raise DivergenceError(
        f"After step {trainer.global_step} the weights {where or 'of another rank'} are not finite. {_REMEDY}"
    )

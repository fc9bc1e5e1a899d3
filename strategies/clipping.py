"""Gradient clipping when each rank has only some gradients, or shards of them."""

from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["_ClipsOverRanks"]


class _ClipsOverRanks(Strategy):
    """Mixin: `protocols.GradientHolder`, and clipping over the gradients of all ranks instead of each rank's own.

    A strategy whose ranks have shards defines `held_gradients` and `total_gradient_norm`.
    """

    takes_over_clipping = True
    last_grad_norm: Tensor | None = None
    """Norm of the gradients at the last clipping by norm, before clipping."""

    @property
    def precision_plugin(self) -> Precision:
        """The plugin that casts and clips."""
        plugin: Precision = super().precision_plugin
        return plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # This is where a strategy can take over clipping, as Lightning's own for FSDP does.
        super(_ClipsOverRanks, type(self)).precision_plugin.fset(self, plugin)  # type: ignore[attr-defined]
        if plugin is not None and self.takes_over_clipping:
            plugin.clip_grad_by_norm = self.clip_by_norm  # type: ignore[method-assign]
            plugin.clip_grad_by_value = self.clip_by_value  # type: ignore[method-assign]

    def held_gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Return the averaged gradients, or shards of them, that this rank has."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    def total_gradient_norm(self, optimizer: Optimizer, norm_type: float) -> Tensor:
        """Return the norm of all gradients together. Collective: call on all ranks.

        Args:
            optimizer: Optimizer of the gradients.
            norm_type: Order of the norm.
        """
        return torch.nn.utils.get_total_norm(self.held_gradients(optimizer), norm_type)

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Return the 2-norm of all gradients together. Collective: call on all ranks."""
        return self.total_gradient_norm(optimizer, 2.0)

    def clip_by_norm(self, optimizer: Optimizer, clip_val: float, norm_type: float = 2.0, **_: Any) -> None:
        """Scale the gradients of all ranks so that their norm is at most ``clip_val``. Collective.

        Args:
            optimizer: Optimizer of the gradients.
            clip_val: Largest norm; 0 leaves the gradients as they are.
            norm_type: Order of the norm.
        """
        if clip_val <= 0:
            return
        self.last_grad_norm = norm = self.total_gradient_norm(optimizer, norm_type)
        gradients = self.held_gradients(optimizer)
        if gradients:
            torch._foreach_mul_(gradients, (clip_val / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].device))

    def clip_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clamp every element of the gradients to ``[-clip_val, clip_val]``.

        Args:
            optimizer: Optimizer of the gradients.
            clip_val: Largest magnitude; 0 leaves the gradients as they are.
        """
        for gradient in self.held_gradients(optimizer) if clip_val > 0 else []:
            gradient.clamp_(-clip_val, clip_val)

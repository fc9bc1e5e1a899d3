"""One optimizer step's worth of micro-batches: its sums, and the gradient of the mean over all of its target tokens."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_lm.distributed import data_ranks
from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.protocols import GradientHolder

__all__ = ["GradientWindow", "WindowTotals", "gradient_norm", "held_gradients"]


class WindowTotals(NamedTuple):
    """Sums over all ranks and micro-batches of one optimizer step, scalars of one type (float64 where there is one)."""

    nll_sum: Tensor
    num_tokens: Tensor
    """Divisor of the sums."""
    num_targets: Tensor
    """Target tokens: the same, unless the loss counts something else."""


class GradientWindow:
    """Makes gradients exactly those of the sum over target tokens divided by the global count of target tokens.

    Lightning divides every micro-batch's loss by ``accumulate_grad_batches`` and data-parallel strategies average over
    ranks, which weighs micro-batches equally instead of tokens. Here each micro-batch gives its sum times a constant;
    when the window is complete, the counts are added up over ranks and the gradients multiplied once.

    The constant is a power of two near ``1 / positions of a micro-batch``: sums stay in the range of fp16 gradients,
    and scaling by it rounds nothing, so the result does not depend on it.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._constant: float | None = None

    def add(self, loss: TokenLoss, *, positions: int, trainer: Trainer, num_targets: Tensor | None = None) -> Tensor:
        """Count a micro-batch and return what `backward` must get.

        Args:
            loss: Sums of the micro-batch.
            positions: Its size, targets or not; the first of a run sets the constant for all ranks.
            trainer: Trainer, for the factor by which Lightning will divide.
            num_targets: Target tokens, where ``loss.num_tokens`` counts something else.
        """
        if self._constant is None:
            size = trainer.strategy.broadcast(positions)
            self._constant = 2.0 ** -round(math.log2(max(1, size)))
        counts = loss.num_tokens, loss.num_tokens if num_targets is None else num_targets
        sums = torch.stack((loss.nll_sum, *(count.to(loss.nll_sum.dtype) for count in counts)))
        self._sums = sums if self._sums is None else self._sums + sums
        return loss.loss_sum * (self._constant * trainer.accumulate_grad_batches)

    def close(self, gradients: Sequence[Tensor], trainer: Trainer) -> WindowTotals:
        """Add up over ranks, rescale the gradients and begin a new window.

        Args:
            gradients: Those that this rank holds, after unscaling and before clipping.
            trainer: Trainer that knows the ranks.
        """
        assert self._sums is not None
        assert self._constant is not None
        sums, self._sums = self._sums, None
        ranks = data_ranks(trainer)
        if trainer.world_size > 1:
            counted = torch.cat((sums, sums.new_ones(1)))
            counted = torch.as_tensor(trainer.strategy.reduce(counted, reduce_op="sum"))
            # Ranks that share each matrix have the same sums; a strategy may count each of them.
            sums = counted[:-1] * (ranks / counted[-1])
        totals = WindowTotals(*sums.unbind())
        # A window without targets has zero gradients, which stay zero.
        factor = ranks / self._constant / totals.num_tokens.clamp(min=1)
        if gradients:
            torch._foreach_mul_(list(gradients), factor.item() if factor.device.type == "cpu" else factor)
        return totals

    def clear(self) -> None:
        """Forget an unfinished window and the constant."""
        self._sums = self._constant = None


def held_gradients(optimizer: Optimizer, strategy: Strategy) -> list[Tensor]:
    """Return the gradients that this rank holds: all, unless the strategy knows better."""
    if isinstance(strategy, GradientHolder):
        return strategy.held_gradients(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def gradient_norm(optimizer: Optimizer, strategy: Strategy) -> Tensor:
    """Return the 2-norm of all gradients together, whole also where they are sharded. Collective: call on all ranks."""
    if isinstance(strategy, GradientHolder):
        return strategy.gradient_norm(optimizer)
    norm = torch.nn.utils.get_total_norm(held_gradients(optimizer, strategy))
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole

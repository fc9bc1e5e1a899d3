"""Gradients of layers that are unfrozen during a run, under torch's DistributedDataParallel."""

import contextlib
from collections.abc import Generator

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn

__all__ = ["_AveragesUnfrozen"]


class _AveragesUnfrozen(DDPStrategy):
    """`DDPStrategy` that also averages parameters which were frozen when the model was wrapped.

    torch's wrapper ignores them: each rank would train them on its own rows (`BaseFinetuning`).
    """

    _wrapped: frozenset[int] = frozenset()
    _adds_up = False

    def configure_ddp(self) -> None:
        """Wrap the model, and record the parameters that the wrapper averages."""
        assert self.model is not None
        self._wrapped = frozenset(id(param) for param in self.model.parameters() if param.requires_grad)
        super().configure_ddp()

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Accumulate gradients on each rank, without communication."""
        self._adds_up = True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._adds_up = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the parameters that the wrapper ignores."""
        super().post_backward(closure_loss)
        if not self._adds_up and isinstance(self.model, nn.parallel.DistributedDataParallel):
            trained = [param for param in self.model.parameters() if param.requires_grad]
            _average([param for param in trained if id(param) not in self._wrapped])


def _average(params: list[nn.Parameter]) -> None:
    for param in params:
        if param.grad is None:  # another rank may have used it
            param.grad = torch.zeros_like(param)
    gradients = [param.grad for param in params if param.grad is not None]
    works = [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]
    for work in works:
        assert work is not None
        work.wait()
    if gradients:
        torch._foreach_div_(gradients, distributed.get_world_size())

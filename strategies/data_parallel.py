"""Data parallel training in one page: every rank computes gradients on its rows, and all take the same step."""

import contextlib
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn

from lightning_lm.deprecation import takes_renamed_arguments
from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Limit, check_numbers
from lightning_lm.strategies.ddp_settings import without_defaults
from lightning_lm.strategies.failure_reports import _ReportingStrategy

__all__ = ["DataParallelStrategy", "GradientAverager"]

Communication = Literal["naive", "flat", "bucketed"]
"""One all-reduce for each parameter after the backward pass; one for all; or one for each bucket, during it."""

_SETTINGS = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"}
_SETTINGS |= {"process_group_backend", "timeout", "start_method"}


@takes_renamed_arguments
class GradientAverager:
    """Averages gradients over ranks.

    Many small messages cost latency, and a single large one cannot start before the last gradient. Buckets are large
    enough for the network, and are all-reduced while the backward pass computes the gradients of earlier layers; in the
    same order on every rank, as collectives must be.

    Args:
        parameters: Trained parameters, in the same order on every rank.
        communication: Communication of gradients: one by one, all at once, or in buckets during the backward pass.
        bucket_bytes: Largest size of a bucket, bytes.

    Source:
        Li et al. 2020, arXiv:2006.15704 (PyTorch DDP), sections 3.2.2 and 3.2.3.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        communication: Communication = "bucketed",
        bucket_bytes: int = 25 * 2**20,
    ) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        backwards = trained[::-1]  # about the order in which the backward pass makes gradients
        limit = {"naive": 0, "flat": None, "bucketed": bucket_bytes}[communication]
        self._buckets = _cut(backwards, limit)
        self._number = {parameter: number for number, bucket in enumerate(self._buckets) for parameter in bucket}
        self._missing: list[int] = []
        self._travelling: list[tuple[Any, Tensor]] = []
        self._active = False
        overlapped = trained if communication == "bucketed" else []
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._ready) for parameter in overlapped]

    def begin(self) -> None:
        """Prepare for a backward pass."""
        self._active, self._travelling = True, []
        self._missing = [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """All-reduce the remaining buckets, wait for all, and write the averages into the gradients."""
        while len(self._travelling) < len(self._buckets):
            self._send()
        for bucket, (work, buffer) in zip(self._buckets, self._travelling, strict=True):
            work.wait()
            buffer.div_(distributed.get_world_size())
            for parameter, part in zip(bucket, buffer.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)
        self._active, self._travelling = False, []

    def close(self) -> None:
        """Release the parameters and their hooks."""
        for hook in self._hooks:
            hook.remove()

    def _ready(self, parameter: Tensor) -> None:
        if not self._active:
            return
        assert isinstance(parameter, nn.Parameter)
        self._missing[self._number[parameter]] -= 1
        while len(self._travelling) < len(self._buckets) and self._missing[len(self._travelling)] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._travelling)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]  # unused: counts as zero
        buffer = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._travelling.append((distributed.all_reduce(buffer, async_op=True), buffer))


@takes_renamed_arguments
class DataParallelStrategy(_ReportingStrategy, DDPStrategy):
    """`DDPStrategy` with `GradientAverager` in place of torch's wrapper: the same gradients, in code to read.

    Parameters that take no part in a loss get a gradient of zeros. For training at scale use "ddp" or `zero1`.

    Args:
        communication: Communication of gradients: one by one, all at once, or in buckets during the backward pass.
        bucket_bytes: Largest size of a bucket, bytes.
        **settings: For `DDPStrategy`: ``timeout``, ``process_group_backend``, ``start_method``.

    Raises:
        ConfigurationError: If a setting is one of torch's wrapper.
    """

    def __init__(
        self, communication: Communication = "bucketed", *, bucket_bytes: int = 25 * 2**20, **settings: Any
    ) -> None:
        settings = without_defaults(settings)
        unfit = sorted(settings.keys() - _SETTINGS)
        if unfit:
            raise ConfigurationError(f'DataParallelStrategy has no {", ".join(unfit)}; leave it out, or use "ddp".')
        super().__init__(**settings)
        check_numbers({"bucket_bytes": Limit.COUNT}, {"bucket_bytes": bucket_bytes})
        self.communication, self.bucket_bytes = communication, bucket_bytes
        self._averager: GradientAverager | None = None
        self._trained: list[nn.Parameter] = []
        self._paused = False

    def configure_ddp(self) -> None:
        """Start all ranks from the weights of the first."""
        assert self.model is not None
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            distributed.broadcast(tensor.detach(), 0)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the optimizers and the gradient averager."""
        super().setup_optimizers(trainer)
        self._make_averager()

    def _make_averager(self) -> None:
        assert self.lightning_module is not None
        self._close()
        if self.world_size > 1:
            self._trained = [param for param in self.lightning_module.parameters() if param.requires_grad]
            self._averager = GradientAverager(
                self._trained, communication=self.communication, bucket_bytes=self.bucket_bytes
            )

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Prepare to all-reduce, unless micro-batches are being accumulated; layers may have been unfrozen."""
        super().pre_backward(closure_loss)
        assert self.lightning_module is not None
        if self._averager is None or self._paused:
            return
        trained = {id(param) for param in self.lightning_module.parameters() if param.requires_grad}
        if trained != {id(param) for param in self._trained}:
            self._make_averager()
        self._averager.begin()

    def post_backward(self, closure_loss: Tensor) -> None:
        """Wait for the averages."""
        if self._averager is not None and not self._paused:
            self._averager.finish()
        super().post_backward(closure_loss)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Accumulate the gradients of micro-batches on each rank; only the last backward pass reduces the sums."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def teardown(self) -> None:
        """Release the parameters and their hooks."""
        self._close()
        super().teardown()

    def generation_context(self, module: LightningModule | nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return a context in which each rank can run the model by itself: here that is always so.

        Args:
            module: Whose model.
        """
        return contextlib.nullcontext()

    def _close(self) -> None:
        if self._averager is not None:
            self._averager.close()
        self._averager = None


def _cut(parameters: Sequence[nn.Parameter], limit: int | None) -> list[list[nn.Parameter]]:
    """Fill buckets of one type in order; ``None`` means that they are never full."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        full = limit is not None and size + parameter.nbytes > limit
        if not buckets or full or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets

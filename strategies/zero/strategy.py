"""ZeRO stages 1 and 2: data-parallel training with sharded optimizer state, and sharded gradients.

A step in order: reduce-scatter the gradients (stage 2, `gradient_reducer`, during the backward pass; with stage 1 DDP
all-reduces them), update the local shard of the parameters, all-gather the parameters (both in `optimizer`).
"""

import contextlib
from collections.abc import Generator
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_lm.distributed import require_all_ranks
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.dtypes import to_accumulate
from lightning_lm.parts import Limit, check_numbers
from lightning_lm.strategies.clipping import _ClipsOverRanks
from lightning_lm.strategies.ddp_settings import without_defaults
from lightning_lm.strategies.failure_reports import _ReportingStrategy
from lightning_lm.strategies.unfrozen import _AveragesUnfrozen
from lightning_lm.strategies.zero.gradient_reducer import GradientReducer
from lightning_lm.strategies.zero.optimizer import ShardedOptimizer
from lightning_lm.strategies.zero.partition import MIN_SPLIT_ELEMENTS

__all__ = ["ShardedOptimizerStrategy"]

_NOT_SHARDED = ("model_averaging_period", "ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper")


class ShardedOptimizerStrategy(_ReportingStrategy, _ClipsOverRanks, _AveragesUnfrozen):
    """ZeRO: `DDPStrategy` with optimizer state, and with ``stage=2`` gradients, sharded over ranks.

    Works with any module and optimizer. Checkpoints are those of an ordinary run: any number of ranks and any other
    strategy can load them. With ``stage=1`` gradients are all-reduced, as under DDP. With ``stage=2`` each gradient is
    reduced only to the rank that updates its parameter, and freed on the others during the backward pass: a third
    less communication, and 1/N of the gradient memory. ``parameter.grad`` is then ``None`` for parameters that other
    ranks update; the strategy clips gradients by norm and value over all ranks. Buffers (batch norm) are not
    synchronised.

    Args:
        stage: 1 shards the optimizer state, 2 also the gradients.
        min_split_elements: Number of elements from which a parameter is split by rows, if its optimizer is elementwise.
        reduce_every_micro_batch: With ``stage=2`` and gradient accumulation, reduce the gradients of each micro-batch
            instead of their sums: less memory, more communication.
        find_unused_parameters: Allow parameters that take no part in a loss; one that no rank used has no gradient.
        gradient_as_bucket_view: With ``stage=1``, let gradients be views of DDP's communication buckets, which saves
            a copy.
        **settings: Arguments of `DDPStrategy`; with ``stage=2`` only ``timeout`` (a ``timedelta``; "0:05:00" in YAML),
            after which a rank that waits for others fails and reports what they are doing, ``process_group_backend``
            and ``start_method``.

    Raises:
        ConfigurationError: If settings or precision do not fit the stage.

    Source:
        Rajbhandari et al. 2019, arXiv:1910.02054 (ZeRO, stages 1 and 2).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = ShardedOptimizerStrategy(stage=2)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        stage: Literal[1, 2] = 1,
        *,
        min_split_elements: int = MIN_SPLIT_ELEMENTS,
        reduce_every_micro_batch: bool = False,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = True,
        **settings: Any,
    ) -> None:
        settings = without_defaults(settings)
        _check_settings(stage, settings)
        if stage == 1:
            settings["find_unused_parameters"] = find_unused_parameters
            settings["gradient_as_bucket_view"] = gradient_as_bucket_view
        self.stage = stage  # the setter of the precision plugin asks for it
        super().__init__(**settings)
        check_numbers({"min_split_elements": Limit.NON_NEGATIVE}, {"min_split_elements": min_split_elements})
        self.min_split_elements = min_split_elements
        self.reduce_every_micro_batch = reduce_every_micro_batch
        self.find_unused_parameters = find_unused_parameters
        self._reducer: GradientReducer | None = None

    # --- set-up and end ---

    @property
    def takes_over_clipping(self) -> bool:  # type: ignore[override]
        """True if no rank has all gradients."""
        return self.stage == 2

    def setup(self, trainer: Trainer) -> None:
        """Refuse a gradient scaler with ``stage=2``, then set up as DDP does."""
        if self.stage == 2 and getattr(self.precision_plugin, "scaler", None) is not None:
            raise ConfigurationError(
                'precision="16-mixed" needs all gradients on each rank to scale the loss, and stage=2 shards them. Use '
                'precision="bf16-mixed", or stage=1.'
            )
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Wrap the model in DDP; with ``stage=2`` only broadcast the weights of rank 0."""
        if self.stage == 1:
            super().configure_ddp()
            return
        assert self.model is not None
        with torch.no_grad():
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                distributed.broadcast(tensor.detach(), 0)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Wrap the optimizers of the module; schedulers keep the ones that they were given."""
        super().setup_optimizers(trainer)
        sharded: list[ShardedOptimizer] = []
        for optimizer in self.optimizers:
            if not isinstance(optimizer, ShardedOptimizer):
                beside = sharded[0] if sharded else None
                optimizer = ShardedOptimizer(optimizer, min_split_elements=self.min_split_elements, beside=beside)
            sharded.append(optimizer)
        self.optimizers = list(sharded)
        self._close_reducer()
        if self.stage == 2 and self.world_size > 1:
            self._reducer = GradientReducer(sharded, find_unused=self.find_unused_parameters)

    def teardown(self) -> None:
        """Release the parameters and their hooks."""
        self._close_reducer()
        super().teardown()

    def _close_reducer(self) -> None:
        if self._reducer is not None:
            self._reducer.close()
        self._reducer = None

    # --- backward passes ---

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Start to reduce gradients as the backward pass makes them."""
        super().pre_backward(closure_loss)
        if self._reducer is not None:
            self._reducer.begin()

    def post_backward(self, closure_loss: Tensor) -> None:
        """Wait for the pending reductions."""
        if self._reducer is not None:
            self._reducer.finish()
        super().post_backward(closure_loss)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Accumulate gradients on each rank, without communication."""
        if self._reducer is None:
            with super().block_backward_sync():
                yield
        elif self.reduce_every_micro_batch:
            yield
        else:
            with self._reducer.paused():
                yield

    # --- gradients over all ranks ---

    def held_gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Return the averaged gradients, or rows of them, that this rank has."""
        sharded = _unwrapped(optimizer)
        return super().held_gradients(sharded) if self._reducer is None else sharded.local_gradients()

    def total_gradient_norm(self, optimizer: Optimizer, norm_type: float) -> Tensor:
        """Return the norm of all gradients together. Collective: call on all ranks.

        Args:
            optimizer: Optimizer of the gradients.
            norm_type: Order of the norm.
        """
        norm = super().total_gradient_norm(optimizer, norm_type)
        if self._reducer is None:
            return norm
        norm = norm.to(self.root_device)
        if norm_type == float("inf"):
            distributed.all_reduce(norm, distributed.ReduceOp.MAX)
            return norm
        powers = to_accumulate(norm) ** norm_type
        distributed.all_reduce(powers)
        return (powers ** (1 / norm_type)).to(norm.dtype)

    # --- the whole model and the whole state ---

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return on rank 0 the state dictionary of the module's optimizer. Collective: call on all ranks."""
        if self.lightning_module is not None:
            require_all_ranks(self.lightning_module.trainer)
        return _unwrapped(optimizer).full_state_dict() or {}

    def generation_context(self, module: LightningModule | nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return a context in which each rank can run the model by itself: here that is always so.

        Args:
            module: Whose model.
        """
        return contextlib.nullcontext()


def _unwrapped(optimizer: Optimizer) -> ShardedOptimizer:
    inner: Optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    assert isinstance(inner, ShardedOptimizer)
    return inner


def _check_settings(stage: int, settings: dict[str, Any]) -> None:
    if stage not in (1, 2):
        raise ConfigurationError(
            f"stage={stage} is unsupported; use 1 (shards optimizer state) or 2 (also gradients). To shard parameters "
            "too, use ShardedModelStrategy (strategy: fsdp2)."
        )
    unfit = [name for name in _NOT_SHARDED if settings.get(name) is not None]
    if stage == 2:
        known = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"}
        known |= {"process_group_backend", "timeout", "start_method"}
        unfit = [name for name in settings if name not in known]
    elif "ddp_comm_hook" in unfit and "model_averaging_period" not in unfit:
        unfit = []  # compressed gradients are averaged gradients still
    if unfit:
        raise ConfigurationError(
            f"ShardedOptimizerStrategy(stage={stage}) cannot work with {', '.join(unfit)}; leave it out, or use "
            + ("stage=1." if stage == 2 else "DDPStrategy.")
        )

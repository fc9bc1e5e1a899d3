"""Matrices split over some ranks, and everything sharded over the others, for any LightningModule."""

import contextlib
from collections.abc import Generator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lightning_lm._lightning import set_mesh_sizes
from lightning_lm.distributed import require_all_ranks
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.dtensor import reshard
from lightning_lm.parts import Limit, check_numbers
from lightning_lm.strategies.checkpoints.sharded import (
    check_together,
    is_sharded,
    load_model,
    load_optimizer,
    read_sharded,
    replaced,
    whole_tensor,
    write_sharded,
)
from lightning_lm.strategies.checkpoints.stock_folder import is_stock
from lightning_lm.strategies.clipping import _ClipsOverRanks
from lightning_lm.strategies.failure_reports import _ReportingStrategy
from lightning_lm.strategies.tensor_parallel.gradients import gradients_of, local_parts, step_by_mesh, total_norm
from lightning_lm.strategies.tensor_parallel.shard import (
    Layout,
    check_model,
    gathered,
    say_what_travels,
    set_synchronised,
    shard_model,
)

__all__ = ["ShardedModelStrategy", "TensorParallelStrategy", "_MeshStrategy"]


class _MeshStrategy(ModelParallelStrategy):
    """`ModelParallelStrategy` that finds its mesh by itself and counts each rank's data once.

    Args:
        tensor_parallel_size: Ranks that split each matrix; "auto" for all of a node.
        **settings: For `ModelParallelStrategy`.
    """

    def __init__(self, tensor_parallel_size: int | Literal["auto"] = "auto", **settings: Any) -> None:
        super().__init__(**settings)
        check_numbers({"tensor_parallel_size": Limit.COUNT}, {"tensor_parallel_size": tensor_parallel_size})
        self.tensor_parallel_size = tensor_parallel_size

    def setup_environment(self) -> None:
        """Form the mesh: matrices are sharded over neighbouring ranks."""
        world_size = self.num_nodes * self.num_processes
        size = self.num_processes if self.tensor_parallel_size == "auto" else self.tensor_parallel_size
        if size < 1 or world_size % size:
            fitting = [str(divisor) for divisor in range(1, world_size + 1) if world_size % divisor == 0]
            raise ConfigurationError(
                f"tensor_parallel_size={size} does not divide the {world_size} processes; use {', '.join(fitting)}."
            )
        set_mesh_sizes(self, data_parallel=world_size // size, tensor_parallel=size)
        super().setup_environment()

    @property
    def data_mesh(self) -> DeviceMesh:
        """The ranks that read different data."""
        return self.device_mesh["data_parallel"]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the ranks that read different data, so that nothing counts twice."""
        return super().reduce(tensor, group or self.data_mesh.get_group(), reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather from the ranks that read different data."""
        return super().all_gather(tensor, group or self.data_mesh.get_group(), sync_grads)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Let all ranks agree."""
        votes = torch.tensor(int(decision), device=self.root_device)
        distributed.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)


_DEFAULT_TIMEOUT = timedelta(minutes=30)


class ShardedModelStrategy(_ReportingStrategy, _ClipsOverRanks, _MeshStrategy):
    """Fully sharded training (FSDP2), with tensor parallelism inside groups of ranks, of any LightningModule.

    The ``world_size / tensor_parallel_size`` groups read different data, and shard parameters, gradients and optimizer
    state among them. The ranks of one group read the same data, and compute a shard of each matmul. Which matrices are
    split follows from plans that modules carry (`protocols.HasParallelPlan`), or from one that is given here. Any
    optimizer, clipping, accumulation and precision but ``16-mixed`` work as on one process, and a checkpoint can be
    loaded on any number of ranks. Under ``bf16-mixed`` parameters and gradients travel in float32, half as many bytes
    under ``bf16-true``. If ``configure_model`` has parallelised the model already, it is left as it is.

    Args:
        tensor_parallel_size: Ranks that split each matrix; "auto" for all of a node, 1 for none.
        sequence_parallel: Also shard activations between the matrices along the sequence: less memory, and no more
            communication. For models that carry plans.
        loss_parallel: Also shard embedding and head by vocabulary; our losses then never gather logits.
        reshard_after_forward: Free each layer's parameters between its forward and backward pass: less memory, more
            communication.
        plan: Roles of modules by name, with globs, for models without plans; see `strategies.tensor_parallel.plan`.
        save_distributed_checkpoint: Checkpoints are folders to which all ranks write; otherwise single files in the
            form of an ordinary run.
        process_group_backend: Backend of torch's process group; by default the one that fits the device.
        timeout: Time after which a rank that waits for others fails and reports what they are doing ("0:05:00" in
            YAML).

    Raises:
        ConfigurationError: At the start, if sizes, plan or precision do not fit.

    Source:
        Zhao et al. 2023, arXiv:2304.11277 (sharding); Shoeybi et al. 2019, arXiv:1909.08053 (tensor parallelism);
        Korthikanti et al. 2022, arXiv:2205.05198 (sequence parallelism).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = ShardedModelStrategy(tensor_parallel_size=2, sequence_parallel=True)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=4, logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        tensor_parallel_size: int | Literal["auto"] = 1,
        *,
        sequence_parallel: bool = False,
        loss_parallel: bool = True,
        reshard_after_forward: bool = True,
        plan: Mapping[str, str] | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = _DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(
            tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.layout = Layout(sequence_parallel, loss_parallel, reshard_after_forward, plan)
        self.saves_folders = save_distributed_checkpoint
        self._sharded: Any = None
        self._checkpoint_path: Path | None = None
        self._accumulates = False

    # --- set-up ---

    def setup(self, trainer: Trainer) -> None:
        """Shard the model, once, then set up as ever."""
        assert self.accelerator is not None
        assert self.model is not None
        module = trainer.lightning_module
        check_model(module, self.precision_plugin)
        if self.data_mesh.size() > 1:
            say_what_travels(module, self.precision_plugin)
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self._sharded = shard_model(module, self.device_mesh, self.layout, self.root_device)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        # FSDP2 updates in place what an evaluation before training would have made for inference only.
        fit_validation = trainer.fit_loop.epoch_loop.val_loop
        for loop in (fit_validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the optimizers of the module fit for parameters on several meshes."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            step_by_mesh(optimizer)
            # Without a gradient scaler a fused optimizer unscales nothing; Lightning would refuse to clip all the same.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    # --- backward passes ---

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Add up gradients on each rank, without communication over the data axis."""
        assert self.lightning_module is not None
        self._accumulates = True
        set_synchronised(self.lightning_module, False)
        try:
            yield
        finally:
            self._accumulates = False
            set_synchronised(self.lightning_module, True)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Add up what ranks that share matrices have each seen a part of."""
        super().post_backward(closure_loss)
        if self._sharded is not None and not self._accumulates:
            self._sharded.add_up_gradients()

    # --- gradients over all ranks ---

    def held_gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Return the parts of averaged gradients that this rank holds."""
        return local_parts(gradients_of(optimizer))

    def total_gradient_norm(self, optimizer: Optimizer, norm_type: float) -> Tensor:
        """Return the norm of all gradients together. Collective: call on all ranks.

        Args:
            optimizer: Optimizer of the gradients.
            norm_type: Order of the norm.
        """
        return total_norm(gradients_of(optimizer), norm_type).to(self.root_device)

    # --- evaluation and generation ---

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, then free the gathered parameters."""
        return self._then_reshard(super().validation_step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, then free the gathered parameters."""
        return self._then_reshard(super().test_step(*args, **kwargs))

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, then free the gathered parameters."""
        return self._then_reshard(super().predict_step(*args, **kwargs))

    def _then_reshard(self, outputs: Any) -> Any:
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        return outputs

    def generation_context(self, module: LightningModule | nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return a context in which all parameters are gathered over the data axis, once.

        Args:
            module: Whose.
        """
        return gathered(module, reshard_after_forward=self.layout.reshard_after_forward)

    # --- checkpoints ---

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Return whether Lightning asks for the optimizers' state: always."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights as this rank holds them."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer as this rank holds it."""
        inner: Optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return inner.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder, or gather tensor by tensor and let rank 0 write a file. Collective: call on all ranks."""
        assert self.lightning_module is not None
        require_all_ranks(self.lightning_module.trainer)
        path = Path(self.broadcast(str(filepath)))
        if self.saves_folders:
            write_sharded(checkpoint, path)
            return
        keeps = self.is_global_zero

        def gather(_place: tuple[str, ...], value: Any) -> Any:
            whole = whole_tensor(value) if isinstance(value, Tensor) else value
            return whole.cpu() if isinstance(whole, Tensor) and keeps else whole if keeps else None

        content = replaced(checkpoint, gather)
        ParallelStrategy.save_checkpoint(self, content, path, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read all but weights and optimizer state; those follow where they belong."""
        path = Path(self.broadcast(str(checkpoint_path)))
        self._checkpoint_path = None
        if is_sharded(path):
            check_together(path)
            self._checkpoint_path = None if is_stock(path) else path
            return read_sharded(path, whole=False)
        return self.checkpoint_io.load_checkpoint(path, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load each rank's part of the weights."""
        assert self.lightning_module is not None
        load_model(self.lightning_module, checkpoint["state_dict"], self._checkpoint_path, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load each rank's part of the optimizers' state."""
        for index, (optimizer, state) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            load_optimizer(optimizer, state, self._checkpoint_path, index)


class TensorParallelStrategy(ShardedModelStrategy):
    """`ShardedModelStrategy` that splits matrices over all ranks of a node by default; its earlier name.

    Args:
        tensor_parallel_size: Ranks that split each matrix; "auto" for all of a node.
        **settings: For `ShardedModelStrategy`.
    """

    def __init__(self, tensor_parallel_size: int | Literal["auto"] = "auto", **settings: Any) -> None:
        super().__init__(tensor_parallel_size, **settings)

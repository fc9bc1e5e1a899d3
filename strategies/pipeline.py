"""Pipeline parallel: consecutive layers on consecutive ranks."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from lightning_lm.distributed import require_all_ranks
from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.modules.pipeline import PipelineModule
from lightning_lm.parts import Limit, check_numbers
from lightning_lm.strategies.failure_reports import _ReportingStrategy

__all__ = ["PipelineStrategy"]


class _Clip(NamedTuple):
    trainer: Trainer
    value: float
    by_value: bool
    """Clamp each element; otherwise scale all gradients by their common norm."""


class PipelineStrategy(_ReportingStrategy, DDPStrategy):
    """Runs a `PipelineModule`: neighbouring ranks are the stages of a pipeline; several pipelines read different rows.

    The gradients of each stage are averaged over the pipelines, by the rule of `PipelineModule`: the sum over target
    tokens divided by their number, over all of them.

    A checkpoint is that of the whole model and its optimizer under their ordinary names: `PretrainModule`, one process,
    any other strategy and any number of stages can load it. It passes through the memory of rank 0's CPU.

    Args:
        pipeline_parallel_size: Number of stages of a pipeline; "auto" for the number of ranks.
        **settings: For `DDPStrategy`: ``timeout``, ``process_group_backend``, ``start_method``.

    Raises:
        ConfigurationError: If the module is no `PipelineModule`, or the ranks are no multiple of the stages.

    Source:
        Huang et al. 2018, arXiv:1811.06965; Narayanan et al. 2021, arXiv:2104.04473.

    Example:
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> trainer = Trainer(strategy=PipelineStrategy(), devices=2, accelerator="cpu", logger=False)
    """

    def __init__(self, pipeline_parallel_size: int | Literal["auto"] = "auto", **settings: Any) -> None:
        super().__init__(**settings)
        check_numbers({"pipeline_parallel_size": Limit.COUNT}, {"pipeline_parallel_size": pipeline_parallel_size})
        self.pipeline_parallel_size = pipeline_parallel_size
        self._groups: dict[str, distributed.ProcessGroup] = {}
        self.clip: _Clip | None = None
        """The Trainer's gradient clipping, which `PipelineModule` applies over all stages."""

    def connect(self, model: LightningModule) -> None:
        """Take gradient clipping over from the Trainer, which refuses it for a module that optimizes by itself."""
        super().connect(model)
        if not isinstance(model, PipelineModule):
            return
        trainer = model.trainer
        if trainer.accumulate_grad_batches != 1:
            count = trainer.accumulate_grad_batches
            raise ConfigurationError(
                f"accumulate_grad_batches={count}: a pipeline cuts each batch into micro-batches by itself. Set "
                f"accumulate_grad_batches=1, a batch_size {count} times as large, and in the module "
                f"pipeline=OneForwardOneBackward(micro_batches=...)."
            )
        if trainer.gradient_clip_val:
            self.clip = _Clip(trainer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm == "value")
            trainer.gradient_clip_val = None

    def teardown(self) -> None:
        """Give gradient clipping back to the Trainer."""
        if self.clip is not None:
            self.clip.trainer.gradient_clip_val = self.clip.value
        self.clip = None
        super().teardown()

    def setup_environment(self) -> None:
        """Form the pipelines, and the groups of ranks that hold the same stage."""
        super().setup_environment()
        if self.num_stages < 1 or self.world_size % self.num_stages:
            fitting = [str(size) for size in range(1, self.world_size + 1) if self.world_size % size == 0]
            raise ConfigurationError(
                f"pipeline_parallel_size={self.num_stages} does not divide the {self.world_size} processes; use "
                f"{', '.join(fitting)}."
            )
        names = ("data_parallel", "pipeline")
        shape = (self.world_size // self.num_stages, self.num_stages)
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        self._groups = {name: mesh[name].get_group() for name in names}

    @property
    def pipeline_group(self) -> distributed.ProcessGroup:
        """The stages of this rank's pipeline."""
        return self._groups["pipeline"]

    @property
    def stage_index(self) -> int:
        """Index of this rank's stage."""
        return self.global_rank % self.num_stages

    @property
    def num_stages(self) -> int:
        """Number of stages of the pipeline."""
        return self.world_size if self.pipeline_parallel_size == "auto" else self.pipeline_parallel_size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """The ranks of a pipeline read the same rows."""
        return {"num_replicas": self.world_size // self.num_stages, "rank": self.global_rank // self.num_stages}

    def setup(self, trainer: Trainer) -> None:
        """Refuse modules other than `PipelineModule`, then set up."""
        module = self.lightning_module
        if not isinstance(module, PipelineModule):
            raise ConfigurationError(
                f"PipelineStrategy needs a PipelineModule, and got {type(module).__name__}. Pretrain with "
                "PipelineModule (--model PipelineModule), or train this module with another strategy."
            )
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.configure_ddp()
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Broadcast the weights of the first pipeline; the model is not wrapped."""
        assert self.model is not None
        if self.num_stages < self.world_size:
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                distributed.broadcast(tensor.detach(), self.stage_index, group=self._groups["data_parallel"])

    # --- what all ranks know ---

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over pipelines; the ranks of one have read the same rows."""
        if self.num_stages == self.world_size:
            return tensor
        return super().reduce(tensor, group or self._groups["data_parallel"], reduce_op)

    def average_gradients(self, optimizer: Optimizer) -> None:
        """Average the gradients of this stage over pipelines."""
        if self.num_stages == self.world_size:
            return
        gradients, group = self.held_gradients(optimizer), self._groups["data_parallel"]
        works = [distributed.all_reduce(gradient, group=group, async_op=True) for gradient in gradients]
        for work in works:
            assert work is not None
            work.wait()
        torch._foreach_div_(gradients, self.world_size // self.num_stages)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return a decision of all ranks together. Collective: call on all ranks."""
        votes = torch.tensor(int(decision), device=self.root_device)
        distributed.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    def held_gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Return the gradients of this stage."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Return the 2-norm of the gradients of all stages together. Collective: call on all ranks."""
        square = torch.nn.utils.get_total_norm(self.held_gradients(optimizer)).to(self.root_device).square()
        distributed.all_reduce(square, group=self.pipeline_group)
        return square.sqrt()

    # --- checkpoints ---

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return on rank 0 the whole model. Collective: call on all ranks."""
        assert self.lightning_module is not None
        require_all_ranks(self.lightning_module.trainer)
        own = {name: tensor.detach().cpu() for name, tensor in super().lightning_module_state_dict().items()}
        stages = self._on_rank_zero(own)
        return {name: tensor for stage in stages for name, tensor in stage.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return on rank 0 the state of one optimizer of the whole model. Collective: call on all ranks."""
        stages = self._on_rank_zero(super().optimizer_state(optimizer))
        return _merged(stages) if stages else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state of this stage's parameters into each optimizer."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            names = {name for group in optimizer.param_groups for name in group["param_names"]}
            optimizer.load_state_dict(_only(state, names))

    def _on_rank_zero(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        if self.global_rank >= self.num_stages:  # of another pipeline
            return []
        found: list[Any] | None = [None] * self.num_stages if self.global_rank == 0 else None
        distributed.gather_object(mine, found, group=self.pipeline_group)
        return found or []


def _merged(stages: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the optimizer states of all stages together, groups by their names, parameters renumbered."""
    entries: dict[str, list[tuple[str, Any]]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for stage in stages:
        for group in stage["param_groups"]:
            settings.setdefault(group["name"], group)
            states = [stage["state"].get(number) for number in group["params"]]
            entries.setdefault(group["name"], []).extend(zip(group["param_names"], states, strict=True))
    state: dict[int, Any] = {}
    groups = []
    number = 0
    for name, members in entries.items():
        numbers = range(number, number + len(members))
        number += len(members)
        names = [member for member, _ in members]
        groups.append({**settings[name], "param_names": names, "params": list(numbers)})
        state.update({index: kept for index, (_, kept) in zip(numbers, members, strict=True) if kept is not None})
    return {"state": state, "param_groups": groups}


def _only(state_dict: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """Return the part of a state dictionary that belongs to some parameters."""
    groups = []
    for group in state_dict["param_groups"]:
        if "param_names" not in group:
            raise CheckpointError(
                "The optimizer's state in the checkpoint has no names of parameters, so it cannot be split over "
                "stages. Load only the weights, with a new optimizer."
            )
        kept = [pair for pair in zip(group["param_names"], group["params"], strict=True) if pair[0] in names]
        if kept:
            groups.append({**group, "param_names": [name for name, _ in kept], "params": [index for _, index in kept]})
    numbers = {index for group in groups for index in group["params"]}
    state = {index: kept for index, kept in state_dict["state"].items() if index in numbers}
    return {"state": state, "param_groups": groups}

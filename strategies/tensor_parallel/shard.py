"""A model on a mesh: split over one axis, sharded over the other, once.

Sharding is FSDP2 on any LightningModule. Units are gathered when they compute: each layer of a module list, then each
model. Lightning calls ``training_step`` and not ``forward``, so the LightningModule itself is no unit; a
`protocols.LanguageModel` is gathered for `hidden` too, and stays so until its gradients are done, because losses read
the weight of its head.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.protocols import LanguageModel
from lightning_lm.strategies.tensor_parallel.plan import check_covered, check_divides, read_plan
from lightning_lm.strategies.tensor_parallel.split import Region, split_modules

__all__ = [
    "Layout",
    "check_model",
    "gathered",
    "models_of",
    "say_what_travels",
    "set_synchronised",
    "shard_model",
    "shard_over_data",
]


class Layout(NamedTuple):
    """Settings of the user; see `ShardedModelStrategy`."""

    sequence_parallel: bool
    loss_parallel: bool
    reshard_after_forward: bool
    plan: Mapping[str, str] | None


def check_model(module: LightningModule, precision: Precision) -> None:
    """Refuse modules and settings that would fail later or be wrong.

    Args:
        module: Configured, not yet sharded.
        precision: Precision of the run.

    Raises:
        ConfigurationError: For a gradient scaler, which cannot see all gradients, or parameters without values.
    """
    if getattr(precision, "scaler", None) is not None:
        raise ConfigurationError(
            'precision="16-mixed" scales gradients by what all of them hold, and here no rank has all. '
            'Use precision="bf16-mixed".'
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ConfigurationError(
            f"{type(module).__name__} was made on the meta device, and ranks would draw its initial weights by "
            "themselves. Build it for real in configure_model; each rank keeps its share only."
        )


def say_what_travels(module: LightningModule, precision: Precision) -> None:
    """Tell that ranks exchange float32 under ``bf16-mixed``, and what halves the bytes.

    Args:
        module: Configured, sharded by the user or not yet.
        precision: Precision of the run.
    """
    if precision.precision != "bf16-mixed":
        return
    remedy = "--trainer.precision bf16-true halves the bytes, and rounds the weights"
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        remedy = (
            "fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), if configure_model lacks "
        )
        remedy += "it, halves the bytes, and rounds norms and routers too"
    rank_zero_info(
        "Under bf16-mixed the ranks exchange parameters and gradients in float32, so that layers that autocast leaves "
        f"in float32 compute as in one process; {remedy}."
    )


def shard_model(module: LightningModule, mesh: DeviceMesh, layout: Layout, device: torch.device) -> Region | None:
    """Split and shard a model in place, or find out that it is.

    Args:
        module: Contains the models.
        mesh: With the axes "data_parallel" and "tensor_parallel".
        layout: Settings of the user.
        device: Device of this rank.

    Returns:
        The ranks that share matrices; ``None`` where there are none, or the user has split the model.

    Raises:
        ConfigurationError: If the plan does not fit, or a model that the user has parallelised leaves replicas whose
            gradients nobody averages.
    """
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        _require_data_axis(module, data)
        return _region_of(module)
    if mesh.size() > 1:
        _make_equal([*module.parameters(), *module.buffers()], device)
    region = None
    if tensor.size() > 1:
        region = _split(module, tensor, layout)
    if data.size() > 1:
        shard_over_data(module, data, reshard_after_forward=layout.reshard_after_forward)
    return region


def _split(module: LightningModule, mesh: DeviceMesh, layout: Layout) -> Region:
    if layout.plan is not None and layout.sequence_parallel:
        raise ConfigurationError(
            "sequence_parallel needs a model that counts positions from its input and carries its own parallel_plan; "
            "a plan was given to the strategy. Leave sequence_parallel out."
        )
    check_divides(module, mesh.size())
    plan = read_plan(module, layout.plan)
    check_covered(module, plan, sequence_parallel=layout.sequence_parallel)
    region = Region(mesh, sequence_parallel=layout.sequence_parallel, loss_parallel=layout.loss_parallel)
    split_modules(plan, region)
    if region.summands and not module.automatic_optimization:
        raise ConfigurationError(
            f"{type(module).__name__} optimises by hand, so nobody knows when its gradients are complete, and those of "
            "norms must be added up then. Use automatic optimisation, or leave sequence_parallel out."
        )
    return region


def _region_of(module: nn.Module) -> Region | None:
    """Find what an earlier run of the same model has made."""
    return next((part.region for part in module.modules() if isinstance(vars(part).get("region"), Region)), None)  # type: ignore[return-value]


def _make_equal(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Broadcast the weights of rank 0, tensor by tensor through the device."""
    with torch.no_grad():
        for tensor in tensors:
            value = tensor.detach().to(device).contiguous()
            distributed.broadcast(value, 0)
            tensor.detach().copy_(value)


def _require_data_axis(module: nn.Module, data: DeviceMesh) -> None:
    axis = "data_parallel"
    alone = [
        name
        for name, parameter in module.named_parameters()
        if not isinstance(parameter, DTensor) or axis not in (parameter.device_mesh.mesh_dim_names or ())
    ]
    if data.size() > 1 and alone:
        raise ConfigurationError(
            f"configure_model has parallelised {type(module).__name__}, but {', '.join(alone[:3])} are not sharded "
            f"over the {data.size()} data-parallel ranks: these would train apart from each other. Apply fully_shard "
            'over device_mesh["data_parallel"], or leave all of it to the strategy.'
        )


def shard_over_data(module: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool) -> None:
    """Shard all parameters of a LightningModule over the ranks of a mesh axis.

    Args:
        module: Module whose children are models.
        mesh: Device mesh of one axis.
        reshard_after_forward: Free each layer after its forward pass, and gather it again for the backward pass.

    Raises:
        ConfigurationError: If a parameter belongs to no model, so that nothing would gather it.
    """
    models = list(models_of(module))
    covered = {id(parameter) for model in models for parameter in model.parameters()}
    alone = [name for name, parameter in module.named_parameters() if id(parameter) not in covered]
    if alone:
        raise ConfigurationError(
            f"The parameters {', '.join(alone[:3])} of {type(module).__name__} belong to no module that is called, so "
            "ranks could not keep them equal. Put each into an nn.Module of its own."
        )
    for model in models:
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        if isinstance(model, LanguageModel):
            for name in ("hidden", "hidden_ahead"):
                if hasattr(model, name):
                    register_fsdp_forward_method(model, name)


def models_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are called as a whole: language models, and children that contain none."""
    for child in module.children():
        holds_models = any(isinstance(part, LanguageModel) for part in child.modules() if part is not child)
        if isinstance(child, LanguageModel) or not holds_models:
            if next(child.parameters(), None) is not None:
                yield child
        else:
            yield from models_of(child)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for part in model.modules():
        if isinstance(part, nn.ModuleList):
            yield from part


def set_synchronised(module: nn.Module, synchronised: bool) -> None:
    """Set whether backward passes reduce gradients; otherwise each rank accumulates them.

    Args:
        module: Contains units.
        synchronised: True to reduce gradients in the next backward pass.
    """
    for unit in _units(module):
        unit.set_requires_gradient_sync(synchronised, recurse=False)


@contextlib.contextmanager
def gathered(module: nn.Module, *, reshard_after_forward: bool) -> Iterator[None]:
    """All-gather all units once and keep them: ranks may then run the model different numbers of times.

    Args:
        module: Contains units.
        reshard_after_forward: Setting of the layers.
    """
    units = list(_units(module))
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        roots = {id(model) for model in models_of(module)} if reshard_after_forward else {id(unit) for unit in units}
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(id(unit) not in roots, recurse=False)


def _units(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))

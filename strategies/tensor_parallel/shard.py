"""A model on a mesh: split over one axis, sharded over the other, once."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.strategies.data_sharding import shard_over_data
from lightning_lm.strategies.tensor_parallel.plan import check_covered, check_divides, read_plan
from lightning_lm.strategies.tensor_parallel.split import Region, split_modules

__all__ = ["Layout", "check_model", "shard_model"]


class Layout(NamedTuple):
    """Settings of the user; see `TensorParallelStrategy`."""

    sequence_parallel: bool
    loss_parallel: bool
    reshard_after_forward: bool
    plan: Mapping[str, str] | None


def check_model(module: LightningModule, precision: Precision) -> None:
    """Refuse what would fail later or be wrong.

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
    """Give all ranks the values of rank 0, tensor by tensor through the device."""
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

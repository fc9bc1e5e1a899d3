"""Sizes of what each rank of a strategy keeps, before there are ranks: for a model on the meta device."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lm.optim.memory import predicted_state_bytes
from lightning_lm.scaling.training_memory import Layout, StateBytes
from lightning_lm.strategies.tensor_parallel.plan import check_covered, check_divides, read_plan
from lightning_lm.strategies.tensor_parallel.split import split_dim
from lightning_lm.strategies.zero.optimizer import with_splits
from lightning_lm.strategies.zero.partition import MIN_SPLIT_ELEMENTS, Placed, place

__all__ = ["local_states", "split_regions"]

Local = Callable[[Tensor], Tensor | None]


def split_regions(model: nn.Module) -> list[nn.Module]:
    """Return the modules that tensor parallelism enters with the residual stream.

    Args:
        model: A model with a plan.

    Raises:
        ConfigurationError: If it has none.
    """
    return [entry.module for entry in read_plan(model) if entry.role == "gather"]


def local_states(module: nn.Module, optimizer: Optimizer, layout: Layout, *, rank: int | None = None) -> StateBytes:
    """Return the bytes that a rank keeps between steps, as the strategies of this package place them.

    Args:
        module: Everything with parameters, on any device.
        optimizer: The ordinary optimizer of the trained ones.
        layout: Parallelism.
        rank: Data-parallel rank; by default the one that keeps the most.

    Raises:
        ConfigurationError: If the model cannot be split over the tensor-parallel ranks.
    """
    split = _split_over_tensor(module, layout)
    if layout.zero_stage == 3:
        ranks, index = layout.data, 0 if rank is None else rank
        local: Local = lambda param: _chunk(split(param), 0, ranks, index)  # noqa: E731
        return _states(module, optimizer, parameters=local, gradients=local, states=local)
    if layout.zero_stage == 0:
        return _states(module, optimizer, parameters=split, gradients=split, states=split)
    owned = _owned(optimizer, layout.data * layout.context, rank)
    return _states(
        module, optimizer, parameters=split, gradients=owned if layout.zero_stage == 2 else split, states=owned
    )


def _states(
    module: nn.Module, optimizer: Optimizer, *, parameters: Local, gradients: Local, states: Local
) -> StateBytes:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return StateBytes(
        parameters=_bytes(map(parameters, module.parameters())),
        gradients=_bytes(map(gradients, trained)),
        optimizer_states=predicted_state_bytes(optimizer, states),
    )


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _split_over_tensor(module: nn.Module, layout: Layout) -> Local:
    """Return the shard of each parameter within a tensor-parallel group, largest rank first."""
    if layout.tensor == 1:
        return lambda param: param
    check_divides(module, layout.tensor)
    plan = read_plan(module)
    check_covered(module, plan, sequence_parallel=layout.sequence_parallel)
    dims: dict[Tensor, int] = {
        parameter: dim
        for entry in plan
        for parameter in entry.module.parameters(recurse=False)
        if (dim := split_dim(entry.role, parameter)) is not None
    }
    return lambda param: _chunk(param, dims[param], layout.tensor, 0) if param in dims else param


def _chunk(tensor: Tensor | None, dim: int, ranks: int, rank: int) -> Tensor | None:
    """Return a rank's part as DTensor cuts it: equal parts, the last ones shorter or empty."""
    if tensor is None or not tensor.dim():
        return tensor
    size = math.ceil(tensor.shape[dim] / ranks)
    start = min(tensor.shape[dim], size * rank)
    return tensor.detach().narrow(dim, start, min(size, tensor.shape[dim] - start))


def _owned(optimizer: Optimizer, ranks: int, rank: int | None) -> Local:
    """Return what a rank updates under ZeRO stages 1 and 2."""
    pairs = dict(with_splits(optimizer, optimizer.param_groups))
    load = [0] * ranks
    placed = [Placed(tuple(param.shape), splits) for param, splits in pairs.items()]
    pieces = dict(zip(pairs, place(placed, ranks, load=load, min_split_elements=MIN_SPLIT_ELEMENTS), strict=True))
    chosen = load.index(max(load)) if rank is None else rank

    def local(param: Tensor) -> Tensor | None:
        mine = [piece for piece in pieces.get(param, ()) if piece.rank == chosen]
        if not mine:
            return None
        return torch.empty((mine[0].stop - mine[0].start, *param.shape[1:]), dtype=param.dtype, device="meta")

    return local

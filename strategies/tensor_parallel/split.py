"""Tensor-parallel versions of modules, each of which computes a shard of the model's matmuls.

Each keeps its name and its parameters' names; a sharded parameter becomes a DTensor, of which only the local
shard takes part in the computation. The collectives are in `lightning_lm.functional.collectives`.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.collectives import (
    all_gather,
    copy_to,
    gather_replicated,
    reduce_from,
    reduce_scatter,
    shard_of,
)
from lightning_lm.strategies.tensor_parallel.plan import Planned

__all__ = ["Region", "split_dim", "split_modules"]

_FEATURES = 2
"""Dimension of the features in [batch, seq, features]."""


class Region:
    """The ranks of a tensor-parallel region, and the state of its current forward pass.

    Args:
        mesh: Device mesh of one axis.
        sequence_parallel: True if the residual stream between the split computations is sharded along the sequence.
        loss_parallel: True if embedding and head are sharded by vocabulary.
    """

    def __init__(self, mesh: DeviceMesh, *, sequence_parallel: bool, loss_parallel: bool) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.sequence_parallel, self.loss_parallel = sequence_parallel, loss_parallel
        self.length = 0
        """Tokens of the rows that are read, of which each rank has a part."""
        self.summands: list[tuple[nn.Module, str]] = []
        """Replicated parameters that each rank uses on some tokens or heads only: their gradients are partial sums."""

    def enter(self, x: Tensor) -> Tensor:
        """Take the stream into a split computation."""
        if self.sequence_parallel:
            return all_gather(x, self.group, dim=1, length=self.length)
        return copy_to(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Bring what this rank computed back to the stream."""
        return reduce_scatter(x, self.group, dim=1) if self.sequence_parallel else reduce_from(x, self.group)

    def add_up_gradients(self) -> None:
        """Add up the gradients of `summands` over ranks, all in one exchange for each type."""
        found = [getattr(module, name).grad for module, name in self.summands]
        gradients = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in found if grad is not None]
        for dtype in sorted({grad.dtype for grad in gradients}, key=str):
            same = [grad for grad in gradients if grad.dtype == dtype]
            flat = torch.cat([grad.flatten() for grad in same])
            distributed.all_reduce(flat, group=self.group)
            parts = flat.split([grad.numel() for grad in same])
            torch._foreach_copy_(same, [part.view_as(grad) for part, grad in zip(parts, same, strict=True)])


def split_modules(plan: Iterable[Planned], region: Region) -> None:
    """Replace modules by their tensor-parallel versions, in place. Tied weights stay tied.

    Args:
        plan: Modules and their roles.
        region: Ranks over which they are split.

    Raises:
        ConfigurationError: If a module is of a kind that cannot be split.
    """
    shards: dict[nn.Parameter, nn.Parameter] = {}
    for entry in plan:
        if entry.role == "channels":
            entry.module.__class__ = _with_local_parameters(type(entry.module))
            for name, parameter in list(entry.module._parameters.items()):
                if parameter is not None:
                    entry.module.register_parameter(name, _shard_of(parameter, 0, region.mesh))
        if entry.role in _SPLIT and (region.loss_parallel or entry.role not in ("embed", "head")):
            kind, dim, share = _SPLIT[entry.role]
            _exchange_class(entry, kind, share, region)
            for name, parameter in list(entry.module.named_parameters(recurse=False)):
                if split_dim(entry.role, parameter) is not None:  # what is added to a sum stays whole
                    if parameter not in shards:
                        shards[parameter] = _shard_of(parameter, dim, region.mesh)
                    entry.module.register_parameter(name, shards[parameter])
        _HOOKS.get(entry.role, _nothing)(entry.module, region)


def _exchange_class(entry: Planned, kind: type[nn.Module], share: type[nn.Module], region: Region) -> None:
    if type(entry.module) is not kind:
        raise ConfigurationError(
            f"{entry.name} is a {type(entry.module).__name__}; {entry.role} needs torch's own nn.{kind.__name__}. "
            "Use tensor_parallel_size=1."
        )
    if getattr(entry.module, "max_norm", None) is not None:
        raise ConfigurationError(f"{entry.name} rescales its rows (max_norm), which ranks cannot do by themselves.")
    entry.module.__class__ = share
    entry.module.region = region  # type: ignore[assignment]


def _shard_of(parameter: nn.Parameter, dim: int, mesh: DeviceMesh) -> nn.Parameter:
    """Cut a parameter as DTensor does: equal parts, the last ones shorter or empty."""
    size = parameter.shape[dim]
    shard_size = -(-size // mesh.size())
    start = min(size, shard_size * mesh.get_local_rank())
    local = parameter.detach().narrow(dim, start, min(shard_size, size - start)).clone()
    shared = DTensor.from_local(local, mesh, [Shard(dim)], shape=parameter.shape, stride=parameter.stride())
    return nn.Parameter(shared, requires_grad=parameter.requires_grad)


def _local(parameter: Any) -> Any:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _with_local_parameters(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of modules that compute as before, on this rank's shard of each parameter."""

    def local_attribute(self: Any, name: str) -> Any:
        return _local(nn.Module.__getattr__(self, name))

    return type(kind.__name__, (kind,), {"__getattr__": local_attribute, "__module__": kind.__module__})


class ColwiseLinear(nn.Linear):
    """Column-parallel linear layer: this rank has some of the output features."""

    region: Region

    def forward(self, input: Tensor) -> Tensor:
        """Return this rank's output features of a whole input."""
        return F.linear(input, _local(self.weight), _local(self.bias))


class RowwiseLinear(nn.Linear):
    """Row-parallel linear layer: this rank has some of the input features."""

    region: Region

    def forward(self, input: Tensor) -> Tensor:
        """Return the output, reduced over ranks."""
        outputs = self.region.leave(F.linear(input, _local(self.weight)))
        return outputs if self.bias is None else outputs + self.bias


class HeadLinear(nn.Linear):
    """Output layer whose vocabulary is sharded."""

    region: Region

    def forward(self, input: Tensor) -> Tensor:
        """Return all logits. Losses use the weight instead, and never gather them."""
        group = self.region.group
        logits = F.linear(copy_to(input, group), _local(self.weight), _local(self.bias))
        missing = -(-self.out_features // group.size()) - logits.shape[-1]
        return gather_replicated(F.pad(logits, (0, missing)), group, dim=logits.dim() - 1, length=self.out_features)


class SplitEmbedding(nn.Embedding):
    """Embedding whose vocabulary is sharded."""

    region: Region

    def forward(self, input: Tensor) -> Tensor:
        """Return the features of all ids, or with sequence parallelism of this rank's part of the row."""
        weight = _local(self.weight)
        start = -(-self.num_embeddings // self.region.group.size()) * self.region.group.rank()
        mine = (input >= start) & (input < start + len(weight))
        padding = (-1 if self.padding_idx is None else self.padding_idx) - start
        ids = torch.where(mine, input - start, 0)
        features = F.embedding(ids, weight, padding if 0 <= padding < len(weight) else None)
        return self.region.leave(torch.where(mine[..., None], features, 0))


_SPLIT: dict[str, tuple[type[nn.Module], int, type[nn.Module]]] = {
    "colwise": (nn.Linear, 0, ColwiseLinear),
    "rowwise": (nn.Linear, 1, RowwiseLinear),
    "head": (nn.Linear, 0, HeadLinear),
    "embed": (nn.Embedding, 0, SplitEmbedding),
}
"""The class of torch, the dimension of its parameters that is cut, and the class of the share."""


def split_dim(role: str, parameter: Tensor) -> int | None:
    """Return the dimension along which a parameter of a module with a role is sharded; ``None`` for none.

    Args:
        role: Role of the module.
        parameter: One of its own parameters.
    """
    dim = _SPLIT[role][1] if role in _SPLIT else 0 if role == "channels" else None
    return dim if dim is not None and parameter.dim() > dim else None


# --- what happens around modules ---


def _nothing(module: nn.Module, region: Region) -> None:
    pass


def _around_embed(module: nn.Module, region: Region) -> None:
    if not region.sequence_parallel:
        return

    def note_length(_module: nn.Module, args: tuple[Any, ...]) -> None:
        region.length = args[0].shape[1]

    module.register_forward_pre_hook(note_length)
    if not region.loss_parallel:
        module.register_forward_hook(lambda _module, _args, output: shard_of(output, region.group, dim=1))


def _around_positions(module: nn.Module, region: Region) -> None:
    if region.sequence_parallel:
        module.register_forward_hook(lambda _module, _args, out: shard_of(out, region.group, dim=out.dim() - 2))


def _around_norm(module: nn.Module, region: Region) -> None:
    if region.sequence_parallel:
        _add_summands(module, region)


def _around_last_norm(module: nn.Module, region: Region) -> None:
    if region.sequence_parallel:
        _add_summands(module, region)
        module.register_forward_hook(
            lambda _module, _args, output: gather_replicated(output, region.group, dim=1, length=region.length)
        )


def _around_partial(module: nn.Module, region: Region) -> None:
    _add_summands(module, region)


def _around_rowwise(module: nn.Module, region: Region) -> None:
    if region.sequence_parallel and getattr(module, "bias", None) is not None:
        region.summands.append((module, "bias"))


def _around_region(module: nn.Module, region: Region) -> None:
    def take_in(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if args:
            return (region.enter(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: region.enter(kwargs[name])}

    module.register_forward_pre_hook(take_in, with_kwargs=True)


def _around_qk_norm(module: nn.Module, region: Region) -> None:
    """Heads by themselves need nothing of each other; all together need all features."""
    _add_summands(module, region)

    def join(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        (x,) = args
        if x.dim() != 3:
            return None
        return (all_gather(x, region.group, dim=_FEATURES, length=x.shape[_FEATURES] * region.group.size()),)

    def cut(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return output.chunk(region.group.size(), _FEATURES)[region.group.rank()] if output.dim() == 3 else None

    module.register_forward_pre_hook(join)
    module.register_forward_hook(cut)


def _add_summands(module: nn.Module, region: Region) -> None:
    region.summands += [(module, name) for name, _ in module.named_parameters(recurse=False)]


_HOOKS = {
    "embed": _around_embed,
    "positions": _around_positions,
    "norm": _around_norm,
    "last_norm": _around_last_norm,
    "partial": _around_partial,
    "rowwise": _around_rowwise,
    "gather": _around_region,
    "qk_norm": _around_qk_norm,
}

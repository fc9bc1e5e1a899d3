"""Vocabulary-parallel output layer: each rank computes the logits of its own ids, and logits are never sent.

The gradient of a logit needs the normaliser over all ids and nothing else of other ranks. So ranks all-reduce the
statistics of each row, a handful of numbers, and compute gradients locally.

Source:
    Shoeybi et al. 2019, arXiv:1909.08053, section 3 (output embedding).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.collectives import all_reduce, copy_to
from lightning_lm.kernels.lm_head.logits import Coefficients, Logits, Normaliser, RowStatistics, gradient, statistics

__all__ = ["AXIS", "VocabShard", "local_head", "sharded_gradient", "sharded_statistics"]

AXIS = "tensor_parallel"
"""Name of the mesh axis along which matrices, and vocabularies, are split."""
_groups: dict[str, ProcessGroup] = {}
"""Process groups by name: an operator takes no objects."""


class VocabShard(NamedTuple):
    """Vocabulary shard of a rank: a range of ids, equally long on each rank, shorter or empty on the last ones."""

    num_ids: int
    """Size of the whole vocabulary."""
    size: int
    """Most ids of a rank, the same on all."""
    group_name: str = ""
    """Process group that the vocabulary is sharded over; empty if it is not."""

    @property
    def group(self) -> ProcessGroup:
        """The process group."""
        return _groups[self.group_name]

    @property
    def start(self) -> int:
        """The first id of this rank."""
        return self.size * self.group.rank()

    def contains(self, targets: Tensor) -> Tensor:
        """Return True for each target that is among this rank's ids."""
        return (targets >= self.start) & (targets < min(self.start + self.size, self.num_ids))


def local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor | None], VocabShard]:
    """Return hidden states, local weight and local bias of a sharded output layer, and its shard of the vocabulary.

    Args:
        hidden: Hidden states, the same on each rank.
        weight: One row per id; a DTensor whose rows are sharded.
        bias: One number per id.

    Raises:
        ConfigurationError: If the weight is sharded over ranks that read different data: it must be gathered first.
    """
    local: Any = weight
    mine: Any = bias
    mesh = local.device_mesh
    if mesh.mesh_dim_names != (AXIS,):
        raise ConfigurationError(
            f"The weight of the head is sharded over {mesh.mesh_dim_names}, so that each rank would need the others' "
            "rows. Call the model through a method that gathers them (register_fsdp_forward_method(model, 'hidden')), "
            "or use lightning_lm.strategies.ShardedModelStrategy, which does."
        )
    group: ProcessGroup = mesh.get_group()
    _groups[group.group_name] = group
    shard = VocabShard(weight.shape[0], -(-weight.shape[0] // group.size()), group.group_name)
    return (copy_to(hidden, group), local.to_local(), None if mine is None else mine.to_local()), shard


def sharded_statistics(
    logits: Logits, shard: VocabShard, operation: str, *, averaged: bool, measured: bool
) -> RowStatistics:
    """Return the statistics over all ids, the same on each rank, by two all-reduces of a few numbers per row.

    Args:
        logits: Logits of this rank's ids; the targets are ids of the whole vocabulary.
        shard: Vocabulary shard of this rank.
        operation: Name of the operation, for the report.
        averaged: Compute mean logits.
        measured: Compute entropies and correct predictions.
    """
    valid, here, group = logits.targets != logits.ignore_index, shard.contains(logits.targets), shard.group
    if logits.values.shape[1]:
        mine = statistics(_local_targets(logits, shard), operation, averaged=averaged, measured=measured)
    else:
        mine = _empty_statistics(logits)
    peak = all_reduce(mine.normaliser.peak, group, op=ReduceOp.MAX)
    # A row in which every id is ruled out, or that holds NaN, must not make others wait.
    below = mine.normaliser.peak - torch.where(peak.isfinite(), peak, 0)
    mass = (mine.normaliser.log_total + below).exp()
    # A rank's entropy gives how far its logits are below the peak, weighted by their probability.
    depth = torch.where(mass > 0, mass * (mine.normaliser.log_total - mine.entropy + below), 0)
    target, correct = torch.where(here, mine.target, 0), torch.where(here & (below == 0), mine.correct, 0)
    partial_sums = (mass, depth, target, mine.mean * logits.values.shape[1], correct)
    mass, depth, target, total, correct = all_reduce(torch.stack(partial_sums), group)
    log_total = mass.log()
    columns = (peak, log_total, target, total / shard.num_ids, log_total - depth / mass, correct)
    peak, log_total, *rest = (torch.where(valid, column, 0) for column in columns)
    return RowStatistics(Normaliser(peak, log_total), *rest)


def sharded_gradient(
    logits: Logits, normaliser: Normaliser, coefficients: Coefficients, operation: str, *, shard: VocabShard
) -> Tensor:
    """Overwrite this rank's logits by the gradient with respect to them, and return it.

    Args:
        logits: Logits of this rank's ids; the targets are ids of the whole vocabulary.
        normaliser: Log-normaliser over all ids.
        coefficients: Coefficients of each row's gradient.
        operation: Name of the operation, for the report.
        shard: Vocabulary shard of this rank.
    """
    if not logits.values.shape[1]:
        return logits.values
    mine = coefficients._replace(target=torch.where(shard.contains(logits.targets), coefficients.target, 0))
    return gradient(_local_targets(logits, shard), normaliser, mine, operation, out=logits.values)


def _local_targets(logits: Logits, shard: VocabShard) -> Logits:
    """Return logits whose targets are columns of this rank; the first column if another rank has the target."""
    targets = logits.targets
    columns = torch.where(shard.contains(targets), targets - shard.start, 0)
    return logits._replace(targets=torch.where(targets == logits.ignore_index, targets, columns))


def _empty_statistics(logits: Logits) -> RowStatistics:
    """Return the statistics of a rank without ids."""
    dtype = torch.promote_types(logits.values.dtype, torch.float32)
    zeros = torch.zeros(len(logits.targets), dtype=dtype, device=logits.targets.device)
    return RowStatistics(Normaliser(zeros - torch.inf, zeros), zeros, zeros, zeros, zeros)

"""A head whose ids are shared out over ranks: each works on the logits of its own, and none ever sends logits.

The gradient of a logit needs the normaliser of all ids and nothing else of the others, so ranks agree on the statistics
of each row, a handful of numbers, and then go on alone.

Source:
    Shoeybi et al. 2019, arXiv:1909.08053, section 3 (output embedding).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.collectives import enter, summed
from lightning_lm.kernels.lm_head.logits import Coefficients, Logits, Normaliser, RowStatistics, gradient, statistics

__all__ = ["AXIS", "Share", "is_split", "split_gradient", "split_head", "split_statistics"]

AXIS = "tensor_parallel"
"""Name of the mesh axis along which matrices, and vocabularies, are split."""
_groups: dict[str, ProcessGroup] = {}
"""The groups that heads were split over, by name: an operator takes no objects."""


class Share(NamedTuple):
    """Vocabulary shard of a rank: a range of ids, equally long on each rank, shorter or empty on the last ones."""

    num_ids: int
    """Number of ids on all ranks."""
    stretch: int
    """Ids of a rank, at most: a number that ranks agree on."""
    ranks: str = ""
    """Name of the group that shares the ids; empty where one rank has all."""

    @property
    def group(self) -> ProcessGroup:
        """The ranks that share the ids."""
        return _groups[self.ranks]

    @property
    def start(self) -> int:
        """The first id of this rank."""
        return self.stretch * self.group.rank()

    def holds(self, targets: Tensor) -> Tensor:
        """Return which targets are among this rank's ids."""
        return (targets >= self.start) & (targets < min(self.start + self.stretch, self.num_ids))


def is_split(weight: Tensor) -> bool:
    """Return whether ranks share the rows of a weight."""
    return hasattr(weight, "device_mesh")


def split_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Share]:
    """Return features, weight and bias of an output layer as this rank works on them, and which ids these are.

    Args:
        hidden: Features, whole on each rank.
        weight: One row per id; a DTensor whose rows are shared among ranks.
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
    share = Share(weight.shape[0], -(-weight.shape[0] // group.size()), group.group_name)
    return (enter(hidden, group), local.to_local(), None if mine is None else mine.to_local()), share


def split_statistics(logits: Logits, share: Share, operation: str, *, averaged: bool, measured: bool) -> RowStatistics:
    """Return the statistics of all ids, the same on each rank, by two exchanges of a few numbers a row.

    Args:
        logits: Logits of this rank's ids; the targets are ids.
        share: Vocabulary shard of this rank.
        operation: On whose behalf, for the report.
        averaged: Compute mean logits.
        measured: Compute entropies and correct predictions.
    """
    valid, here, group = logits.targets != logits.ignore_index, share.holds(logits.targets), share.group
    if logits.values.shape[1]:
        mine = statistics(_of_columns(logits, share), operation, averaged=averaged, measured=measured)
    else:
        mine = _nothing(logits)
    peak = summed(mine.normaliser.peak, group, largest=True)
    # A row in which every id is ruled out, or that holds NaN, must not make others wait.
    below = mine.normaliser.peak - torch.where(peak.isfinite(), peak, 0)
    mass = (mine.normaliser.log_total + below).exp()
    # By its entropy a rank knows how far below the peak its logits are, weighted by their probability.
    depth = torch.where(mass > 0, mass * (mine.normaliser.log_total - mine.entropy + below), 0)
    target, correct = torch.where(here, mine.target, 0), torch.where(here & (below == 0), mine.correct, 0)
    summands = (mass, depth, target, mine.mean * logits.values.shape[1], correct)
    mass, depth, target, total, correct = summed(torch.stack(summands), group)
    log_total = mass.log()
    columns = (peak, log_total, target, total / share.num_ids, log_total - depth / mass, correct)
    peak, log_total, *rest = (torch.where(valid, column, 0) for column in columns)
    return RowStatistics(Normaliser(peak, log_total), *rest)


def split_gradient(
    logits: Logits, normaliser: Normaliser, coefficients: Coefficients, operation: str, *, share: Share
) -> Tensor:
    """Write the gradient with respect to this rank's logits over them, and return it.

    Args:
        logits: Logits of this rank's ids; the targets are ids.
        normaliser: Log-normaliser over all ids.
        coefficients: The four numbers of each row.
        operation: On whose behalf, for the report.
        share: Vocabulary shard of this rank.
    """
    if not logits.values.shape[1]:
        return logits.values
    mine = coefficients._replace(target=torch.where(share.holds(logits.targets), coefficients.target, 0))
    return gradient(_of_columns(logits, share), normaliser, mine, operation, out=logits.values)


def _of_columns(logits: Logits, share: Share) -> Logits:
    """Return logits whose targets are columns of this rank, the first one where another rank has the target."""
    targets = logits.targets
    columns = torch.where(share.holds(targets), targets - share.start, 0)
    return logits._replace(targets=torch.where(targets == logits.ignore_index, targets, columns))


def _nothing(logits: Logits) -> RowStatistics:
    """Return the statistics of no ids at all."""
    dtype = torch.promote_types(logits.values.dtype, torch.float32)
    zeros = torch.zeros(len(logits.targets), dtype=dtype, device=logits.targets.device)
    return RowStatistics(Normaliser(zeros - torch.inf, zeros), zeros, zeros, zeros, zeros)

"""A vocabulary whose logits lie on several ranks, each holding a stretch of the ids; or on one, whole.

Losses ask only for what is here, so that they are the same for both. Ranks exchange two numbers a token: never logits.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.collectives import enter, leave, summed

__all__ = ["AXIS", "Head", "SplitVocabulary", "Survey", "Vocabulary", "is_split", "split_head"]

AXIS = "tensor_parallel"
"""Name of the mesh axis along which matrices, and vocabularies, are split."""


class Survey(NamedTuple):
    """What a loss needs to know of each row of logits; every number is the whole vocabulary's."""

    normaliser: Float[Tensor, " rows"]
    """The logarithm of the sum of exponentials. Nats."""
    target: Float[Tensor, " rows"]
    """The logit of the target."""
    mean: Float[Tensor, " rows"] | None
    """Over all ids, where it was asked for."""


class Vocabulary:
    """All ids on this rank.

    Args:
        size: Number of ids.
    """

    def __init__(self, size: int) -> None:
        self.size = self.stretch = size
        """All ids, and as many of them as a rank holds at most: a number that ranks agree on."""

    def survey(self, logits: Tensor, targets: Tensor, *, mean: bool = False) -> Survey:
        """Look at rows of logits, differentiably.

        Args:
            logits: Of the ids that this rank holds; float32 or better.
            targets: Ids.
            mean: Whether the mean logit is wanted.
        """
        target = logits.gather(1, targets[:, None]).squeeze(1)
        return Survey(logits.logsumexp(dim=-1), target, logits.mean(dim=-1) if mean else None)

    def total(self, values: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return the sum over all ids of what each rank has summed over its own."""
        return values

    def are_largest(self, survey: Survey, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        """Return which targets are the likeliest ids."""
        return logits.argmax(dim=-1) == targets

    def add_at(self, gradient: Tensor, targets: Tensor, values: Tensor) -> Tensor:
        """Add one value a row to the column of its target, in place."""
        return gradient.scatter_add_(1, targets[:, None], values[:, None])


class SplitVocabulary(Vocabulary):
    """A stretch of the ids on each rank: equally many, fewer or none on the last ranks.

    Args:
        size: Number of all ids.
        group: The ranks that share them.

    Source:
        Shoeybi et al. 2019, arXiv:1909.08053, section 3 (output embedding).
    """

    def __init__(self, size: int, group: ProcessGroup) -> None:
        super().__init__(size)
        self.group = group
        self.stretch = -(-size // group.size())
        self.start = min(size, self.stretch * group.rank())
        self.stop = min(size, self.start + self.stretch)

    def survey(self, logits: Tensor, targets: Tensor, *, mean: bool = False) -> Survey:
        """Look at rows of logits, differentiably, with two exchanges of a few numbers a row."""
        found = _Survey.apply(logits, targets, self, mean)  # type: ignore[no-untyped-call]
        return Survey(*found)

    def total(self, values: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return the sum over all ids of what each rank has summed over its own."""
        return leave(values, self.group)

    def are_largest(self, survey: Survey, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        """Return which targets are the likeliest ids; of equally likely ones all are."""
        return survey.target >= summed(self.largest(logits), self.group, largest=True)

    def add_at(self, gradient: Tensor, targets: Tensor, values: Tensor) -> Tensor:
        """Add one value a row to the column of its target, in place, where this rank has that column."""
        columns, mine = self.columns(targets)
        if not gradient.shape[1]:
            return gradient
        return gradient.scatter_add_(1, columns[:, None], torch.where(mine, values, 0)[:, None])

    def columns(self, targets: Int[Tensor, " rows"]) -> tuple[Tensor, Tensor]:
        """Return the column of each target, and whether this rank has it (elsewhere the column is 0)."""
        mine = (targets >= self.start) & (targets < self.stop)
        return torch.where(mine, targets - self.start, 0), mine

    def largest(self, logits: Tensor) -> Tensor:
        """Return the largest logit of each row on this rank."""
        return logits.amax(dim=-1) if logits.shape[1] else logits.new_full((len(logits),), -torch.inf)


class _Survey(torch.autograd.Function):
    """The gradient of the normaliser is the probability, that of the target one in its column."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, vocabulary: SplitVocabulary, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        largest = summed(vocabulary.largest(logits), vocabulary.group, largest=True)
        # A row in which every id is ruled out, or that holds NaN, must not make others wait.
        shift = torch.where(largest.isfinite(), largest, 0)
        columns, mine = vocabulary.columns(targets)
        mass = (logits - shift[:, None]).exp_().sum(dim=-1)
        picked = logits.gather(1, columns[:, None]).squeeze(1) if logits.shape[1] else torch.zeros_like(mass)
        parts = [mass, torch.where(mine, picked, 0), *([logits.sum(dim=-1)] if mean else [])]
        mass, target, *sums = summed(torch.stack(parts), vocabulary.group)
        normaliser = shift + mass.log()
        ctx.save_for_backward(logits, targets, normaliser)
        ctx.vocabulary = vocabulary
        return normaliser, target, sums[0] / vocabulary.size if sums else None

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, normaliser = ctx.saved_tensors
        by_normaliser, by_target, by_mean = upstream
        assert by_normaliser is not None
        gradient = (logits - normaliser[:, None]).exp_().mul_(by_normaliser[:, None])
        if by_target is not None:
            ctx.vocabulary.add_at(gradient, targets, by_target)
        if by_mean is not None:
            gradient += by_mean[:, None] / ctx.vocabulary.size
        return gradient, None, None, None


def is_split(weight: Tensor) -> bool:
    """Return whether ranks share the rows of a weight."""
    return hasattr(weight, "device_mesh")


class Head(NamedTuple):
    """An output layer as this rank holds it."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    vocabulary: Vocabulary


def split_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    """Return features, weight and bias of an output layer as this rank works on them, and which ids these are.

    Args:
        hidden: Features, whole on each rank.
        weight: One row per id; a DTensor where the rows are shared among ranks.
        bias: One number per id.

    Raises:
        ConfigurationError: If the weight is sharded over ranks that read different data: it must be gathered first.
    """
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return Head(hidden, weight, bias, Vocabulary(weight.shape[0]))
    if mesh.mesh_dim_names != (AXIS,):
        raise ConfigurationError(
            f"The weight of the head is sharded over {mesh.mesh_dim_names}, so that each rank would need the others' "
            "rows. Call the model through a method that gathers them (register_fsdp_forward_method(model, 'hidden')), "
            "or use lightning_lm.strategies.TensorParallelStrategy, which does."
        )
    group = mesh.get_group()
    local: Any = weight
    mine: Any = bias
    vocabulary = SplitVocabulary(weight.shape[0], group)
    return Head(enter(hidden, group), local.to_local(), None if mine is None else mine.to_local(), vocabulary)

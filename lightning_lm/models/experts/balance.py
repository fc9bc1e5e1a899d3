"""Balancing the load of experts: a bias on the choice without a loss, or a loss that is a sum over tokens.

Loads are those of a whole optimizer step, over all ranks and micro-batches, without padding; the training module hands
them over when the step is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lightning_lm.functional.experts import (
    ExpertChoices,
    Score,
    balanced_bias,
    distribution,
    lagged_balance_loss,
    sequence_balance_loss,
)
from lightning_lm.parts import Limit, Part

__all__ = ["Balance", "BalanceState", "LaggedLoss", "LoadBias", "SequenceLoss"]


@dataclass(frozen=True, kw_only=True)
class Balance(Part):
    """Base of the ways to balance the load of experts."""

    def build(self, num_experts: int) -> "BalanceState":
        """Return a module that keeps what has to be known from step to step.

        Args:
            num_experts: Experts of the layer.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LoadBias(Balance, limits={"rate": Limit.NON_NEGATIVE}):
    """A bias on the scores, for the choice alone, that rises for experts with too few tokens and falls for the others.

    There is no loss, so the gradients of the model stay those of its task.

    Args:
        rate: Change of the bias at each optimizer step. In units of a score: sigmoids are of size one, a softmax over
            many experts gives far smaller scores. Short runs want a larger one (5e-3 for a few hundred steps).

    Source:
        Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """

    rate: float = 1e-3

    def build(self, num_experts: int) -> "BalanceState":
        """Return a module that keeps the bias."""
        return _Bias(self, num_experts)


@dataclass(frozen=True, kw_only=True)
class LaggedLoss(Balance, limits={"weight": Limit.NON_NEGATIVE}):
    """The load-balancing loss with the loads of the optimizer step before, so that it is exact over micro-batches.

    Args:
        weight: Factor on the loss, which is 1 per token and layer if the load is uniform.

    Source:
        Fedus et al. 2021 (Switch), arXiv:2101.03961, equation 4; loads of the whole step: Qiu et al. 2025,
        arXiv:2501.11873.
    """

    weight: float = 1e-2

    def build(self, num_experts: int) -> "BalanceState":
        """Return a module that keeps the fractions of the last step."""
        return _Lagged(self, num_experts)


@dataclass(frozen=True, kw_only=True)
class SequenceLoss(Balance, limits={"weight": Limit.NON_NEGATIVE}):
    """The load-balancing loss of each document by itself.

    Args:
        weight: Factor on the loss, which is 1 per token and layer if the load is uniform.

    Source:
        DeepSeek-V3, arXiv:2412.19437, equation 17.
    """

    weight: float = 1e-4

    def build(self, num_experts: int) -> "BalanceState":  # noqa: ARG002
        """Return a module that keeps nothing."""
        return _OfSequences(self)


class BalanceState(nn.Module):
    """Base of what a layer keeps for balancing. Its buffers stay in float32 whatever type the model is cast to."""

    @property
    def choice_bias(self) -> Float[Tensor, " experts"] | None:
        """Added to the scores for the choice; ``None`` for nothing."""
        return None

    def reset_buffers(self) -> None:
        """Begin anew; for buffers that were made without values."""

    def loss(
        self,
        logits: Float[Tensor, "tokens experts"],  # noqa: ARG002
        choices: ExpertChoices,  # noqa: ARG002
        *,
        score: Score,  # noqa: ARG002
        sequences: Callable[[], Tensor],  # noqa: ARG002
        counted: Bool[Tensor, " tokens"] | None,  # noqa: ARG002
    ) -> Float[Tensor, ""] | None:
        """Return a sum over tokens to add to the training loss, or ``None``.

        Args:
            logits: Output of the router.
            choices: Choices made from them.
            score: Kind of the scores.
            sequences: Returns the index of each token's document.
            counted: Tokens that count; ``None`` for all.
        """
        return None

    def update(self, counts: Float[Tensor, " experts"]) -> None:
        """Take in the loads of an optimizer step that is taken.

        Args:
            counts: Choices of each expert over all ranks and micro-batches.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move buffers, but keep their type: a step of a thousandth is lost in bfloat16."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class _Bias(BalanceState):
    bias: Tensor

    def __init__(self, part: LoadBias, num_experts: int) -> None:
        super().__init__()
        self.part = part
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    @property
    def choice_bias(self) -> Tensor:
        return self.bias

    def reset_buffers(self) -> None:
        self.bias.zero_()

    def update(self, counts: Tensor) -> None:
        self.bias.copy_(balanced_bias(self.bias, counts, self.part.rate))


class _Lagged(BalanceState):
    fractions: Tensor

    def __init__(self, part: LaggedLoss, num_experts: int) -> None:
        super().__init__()
        self.part = part
        self.register_buffer("fractions", torch.full((num_experts,), 1 / num_experts, dtype=torch.float32))

    def reset_buffers(self) -> None:
        self.fractions.fill_(1 / len(self.fractions))

    def loss(
        self,
        logits: Tensor,
        choices: ExpertChoices,  # noqa: ARG002
        *,
        score: Score,
        sequences: Callable[[], Tensor],  # noqa: ARG002
        counted: Tensor | None,
    ) -> Tensor | None:
        # A copy: autograd keeps the fractions, and the next step changes them in place.
        return self.part.weight * lagged_balance_loss(distribution(logits, score), self.fractions.clone(), counted)

    def update(self, counts: Tensor) -> None:
        self.fractions.copy_(counts / counts.sum().clamp(min=1))


class _OfSequences(BalanceState):
    def __init__(self, part: SequenceLoss) -> None:
        super().__init__()
        self.part = part

    def loss(
        self,
        logits: Tensor,
        choices: ExpertChoices,
        *,
        score: Score,
        sequences: Callable[[], Tensor],
        counted: Tensor | None,
    ) -> Tensor | None:
        shares = distribution(logits, score)
        return self.part.weight * sequence_balance_loss(shares, choices.experts, sequences(), counted)

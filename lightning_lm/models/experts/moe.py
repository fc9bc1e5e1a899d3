"""Mixture of experts: a feed-forward layer of which each token uses a few of many.

Read `functional.experts` for the formulas. A token's router chooses its experts (`routers`), tokens are sorted by
expert and multiplied slice by slice (`stacks`), and each gets the weighted sum of its experts' outputs. `balance` keeps
the experts equally busy. No token is dropped unless a capacity is set, and then in training only.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.dtypes import to_accumulate
from lightning_lm.functional.experts import (
    Assignment,
    collect_tokens,
    combine,
    count_choices,
    distribution,
    group_by_expert,
    router_z_loss,
)
from lightning_lm.models.auxiliary import LayerLoad
from lightning_lm.models.context import Context
from lightning_lm.models.experts.balance import Balance, LoadBias
from lightning_lm.models.experts.routers import Routed, Router, TopK
from lightning_lm.models.experts.stacks import build_experts
from lightning_lm.models.ffn import FFN, GLU
from lightning_lm.models.roles import with_role
from lightning_lm.parts import Limit

__all__ = ["MixtureOfExperts", "MoE"]


@dataclass(frozen=True, kw_only=True)
class MoE(
    FFN,
    limits={"num_experts": Limit.COUNT, "z_loss": Limit.NON_NEGATIVE, "capacity_factor": Limit.POSITIVE},
):
    """Mixture of experts.

    Args:
        experts: One expert.
        num_experts: Number of experts that the router chooses from.
        router: Choice of the experts of a token.
        balance: Means of keeping their load even; ``None`` for none, which a router without weights has in any case.
        z_loss: Weight of the squared log-normaliser of the router's logits (1e-3 in ST-MoE).
        shared: Expert that every token uses beside the chosen ones; ``None`` for none.
        shared_gate: Multiply the shared expert's output by a sigmoid of a feature of its own.
        capacity_factor: In training an expert takes at most this multiple of its even load of a micro-batch, and what
            comes later is dropped; ``None`` to keep all. Outputs then depend on the other tokens of the micro-batch.

    Source:
        Shazeer et al. 2017, arXiv:1701.06538; shared experts: DeepSeekMoE, arXiv:2401.06066, section 3.2; their gate:
        Qwen1.5-MoE; capacity: Fedus et al. 2021, arXiv:2101.03961, equation 3.

    Example:
        >>> layer = MoE(experts=GLU(hidden_size=32), num_experts=8, router=TopK(k=2)).build(16)
        >>> layer(torch.zeros(1, 3, 16)).shape
        torch.Size([1, 3, 16])
    """

    experts: FFN = GLU()
    num_experts: int = 8
    router: Router = TopK()
    balance: Balance | None = LoadBias()
    z_loss: float = 0.0
    shared: FFN | None = None
    shared_gate: bool = False
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.router.check(self.num_experts)
        if self.shared_gate and self.shared is None:
            raise ConfigurationError("shared_gate=True needs a shared expert; give shared=GLU(), or leave it out.")
        if not self.router.learns and (self.z_loss or not isinstance(self.balance, LoadBias | None)):
            raise ConfigurationError(
                f"{type(self.router).__name__} has no logits, so there is nothing for z_loss={self.z_loss} and "
                f"balance={self.balance} to act on. Set z_loss=0 and balance=null, or use TopK."
            )

    def build(self, d_model: int) -> nn.Module:
        """Return a module that maps ``[batch, seq, d_model]`` to the same shape."""
        return MixtureOfExperts(self, d_model)


class MixtureOfExperts(nn.Module):
    """Mixture of experts.

    Args:
        part: The description.
        d_model: Features of the residual stream.
    """

    takes_context: ClassVar = True
    """The layer is called with the context of its tokens."""

    def __init__(self, part: MoE, d_model: int) -> None:
        super().__init__()
        self.part, self.num_experts, self.chosen = part, part.num_experts, part.router.k
        self.router = part.router.build(d_model, part.num_experts)
        share = self.chosen / part.num_experts
        self.experts = build_experts(part.experts, d_model, part.num_experts, active_share=share)
        self.shared = None if part.shared is None else part.shared.build(d_model)
        gate = with_role(nn.Linear(d_model, 1, bias=False), "router") if part.shared_gate else None
        self.shared_gate = gate
        balanced = part.balance is not None and part.router.learns
        self.balance: Any = part.balance.build(part.num_experts) if part.balance is not None and balanced else None

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], context: Context | None = None
    ) -> Float[Tensor, "batch seq d_model"]:
        """Transform each token by its experts.

        Args:
            x: Hidden states.
            context: Token ids and documents of the tokens, and the list of auxiliary losses.
        """
        tokens = x.flatten(0, -2)
        ids = None if context is None or context.input_ids is None else context.input_ids.flatten()
        counted = None if context is None or context.counted is None else context.counted.flatten()
        routed: Routed = self.router(tokens, ids, None if self.balance is None else self.balance.choice_bias)
        choices = routed.choices
        capacity = self._capacity(len(tokens))
        assignment = group_by_expert(choices.experts, self.num_experts, capacity=capacity, counted=counted)
        weights = choices.weights.flatten().index_select(0, assignment.order)
        rows = self.run_experts(collect_tokens(tokens, assignment), assignment.counts, weights)
        out = combine(rows, assignment, len(tokens)).view(x.shape)
        # Not `self.training`: objectives that compare with a reference train in evaluation mode, without dropout.
        if context is not None and context.auxiliary is not None and torch.is_grad_enabled():
            context.auxiliary.append(self._load(routed, assignment, context, counted))
        return out if self.shared is None else out + self._shared_output(x)

    def run_experts(self, rows: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        """Return each row's output of its expert, times its weight; a strategy may let other ranks compute it.

        Args:
            rows: Features, [rows, d_model], in the order of the experts.
            counts: Rows of each expert, int64 [experts].
            weights: Factor on the output of each row.
        """
        return cast(Tensor, self.experts(rows, counts, weights))

    def end_step(self, counts: Float[Tensor, " experts"]) -> None:
        """Take in the loads of an optimizer step that is taken.

        Args:
            counts: Choices of each expert over all ranks and micro-batches.
        """
        trained = any(parameter.requires_grad for parameter in self.router.parameters())
        if self.balance is not None and trained:  # a frozen base under adapters stays as it is
            self.balance.update(counts)

    def _shared_output(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        shared: Tensor = self.shared(x)
        return shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid()

    def _capacity(self, num_tokens: int) -> int | None:
        factor = self.part.capacity_factor
        if factor is None or not self.training:
            return None
        return math.ceil(num_tokens * self.chosen * factor / self.num_experts)

    def _load(self, routed: Routed, assignment: Assignment, context: Context, counted: Tensor | None) -> LayerLoad:
        """Return the load of the layer, and its auxiliary loss."""
        experts, logits = routed.choices.experts, routed.logits
        counts = count_choices(experts, self.num_experts, counted)
        loss = None if logits is None else self._loss(logits, routed, context, counted)
        with torch.no_grad():
            total = counts.sum()
            dropped = torch.zeros_like(total) if self.part.capacity_factor is None else total - assignment.counts.sum()
            entropy = torch.zeros((), device=experts.device) if logits is None else self._entropy(logits, counted)
            added = torch.zeros_like(entropy) if loss is None else loss.detach()
            sums = torch.stack([to_accumulate(value) for value in (total / self.chosen, dropped, entropy, added)])
        return LayerLoad(self, counts, sums, loss)

    def _loss(self, logits: Tensor, routed: Routed, context: Context, counted: Tensor | None) -> Tensor | None:
        found = None
        if self.balance is not None:
            score = self.part.router.score  # type: ignore[attr-defined]
            found = self.balance.loss(
                logits, routed.choices, score=score, sequences=context.sequence_index, counted=counted
            )
        if self.part.z_loss:
            z_loss = self.part.z_loss * router_z_loss(logits, counted)
            found = z_loss if found is None else found + z_loss
        return found

    def _entropy(self, logits: Tensor, counted: Tensor | None) -> Tensor:
        shares = distribution(logits, self.part.router.score)  # type: ignore[attr-defined]
        per_token = torch.special.entr(shares).sum(-1)
        return (per_token if counted is None else torch.where(counted, per_token, 0)).sum()

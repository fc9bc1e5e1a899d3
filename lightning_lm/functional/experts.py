"""Mixture of experts as functions: which experts a token goes to, tokens in the order of their experts, and back.

A token's router logits become scores; the best few experts are chosen, perhaps with a bias that balances their load and
only inside the best groups of experts. Tokens are then sorted by expert, so that each expert multiplies one slice of
rows, and no mask of all tokens by all experts is ever made. The losses that balance the load are sums over tokens, so
that micro-batches and ranks can be added up exactly.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_lm.functional.dtypes import to_accumulate

__all__ = [
    "Assignment",
    "ExpertChoices",
    "Score",
    "balanced_bias",
    "collect_tokens",
    "combine",
    "count_choices",
    "distribution",
    "expert_scores",
    "group_by_expert",
    "lagged_balance_loss",
    "route",
    "router_z_loss",
    "sequence_balance_loss",
]

Score = Literal["softmax", "sigmoid", "chosen_softmax"]
"""Scores of the experts of a token: a softmax over all, a sigmoid of each, or a softmax over the chosen ones."""


class ExpertChoices(NamedTuple):
    """The experts of each token."""

    experts: Int[Tensor, "tokens chosen"]
    """Index of each chosen expert."""
    weights: Float[Tensor, "tokens chosen"]
    """Factor on its output."""


class Assignment(NamedTuple):
    """Choices in the order of the experts: first all tokens of expert 0, then those of expert 1, ..."""

    order: Int[Tensor, " rows"]
    """Place of each row among all choices, token after token: ``token * chosen + rank``."""
    counts: Int[Tensor, " experts"]
    """Rows of each expert."""
    chosen: int
    """Experts per token."""

    @property
    def tokens(self) -> Int[Tensor, " rows"]:
        """The token of each row."""
        return self.order // self.chosen


def expert_scores(logits: Float[Tensor, "tokens experts"], score: Score) -> Float[Tensor, "tokens experts"]:
    """Return the scores that experts are chosen by.

    Args:
        logits: Output of the router, in float32 or better.
        score: Kind of the scores.
    """
    match score:
        case "softmax":
            return logits.softmax(-1)
        case "sigmoid":
            return logits.sigmoid()
        case _:
            return logits


def route(
    logits: Float[Tensor, "tokens experts"],
    k: int,
    *,
    score: Score = "softmax",
    normalise: bool = False,
    scale: float = 1.0,
    groups: tuple[int, int, int] | None = None,
    bias: Float[Tensor, " experts"] | None = None,
) -> ExpertChoices:
    """Choose the ``k`` best experts of each token, and weigh them by their scores.

    The bias decides only which experts are chosen; the weights are the scores without it.

    Args:
        logits: Output of the router, in float32 or better.
        k: Experts per token.
        score: Kind of the scores.
        normalise: Divide the weights of a token by their sum.
        scale: Factor on the weights. Unitless.
        groups: Number of groups, groups that a token may use, and best experts whose scores add up to a group's score;
            ``None`` to choose among all experts.
        bias: Added to the scores for the choice.

    Source:
        Shazeer et al. 2017, arXiv:1701.06538; groups: DeepSeek-V3, arXiv:2412.19437, section 2.1.2; bias: Wang et al.
        2024, arXiv:2408.15664, equation 3; softmax over the chosen: Jiang et al. 2024 (Mixtral), arXiv:2401.04088.
    """
    scores = expert_scores(logits, score)
    ranking = scores.detach() if bias is None else scores.detach() + bias
    if groups is not None:
        ranking = _within_best_groups(ranking, *groups)
    experts = ranking.topk(k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if score == "chosen_softmax":
        weights = weights.softmax(-1)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ExpertChoices(experts, weights if scale == 1.0 else weights * scale)


def _within_best_groups(ranking: Tensor, num_groups: int, num_chosen: int, best: int) -> Tensor:
    """Exclude the experts of all but the best groups."""
    grouped = ranking.unflatten(-1, (num_groups, -1))
    group_scores = grouped.topk(best, dim=-1).values.sum(-1)
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept = kept.scatter(-1, group_scores.topk(num_chosen, dim=-1).indices, True)
    masked: Tensor = grouped.masked_fill(~kept[..., None], -math.inf)
    return masked.flatten(-2)


def group_by_expert(
    experts: Int[Tensor, "tokens chosen"],
    num_experts: int,
    *,
    capacity: int | None = None,
    counted: Bool[Tensor, " tokens"] | None = None,
) -> Assignment:
    """Sort choices by expert; among those of one expert, earlier tokens come first.

    Args:
        experts: Chosen experts of each token.
        num_experts: Number of experts.
        capacity: Most rows of an expert; choices beyond it are dropped. ``None`` to keep all.
        counted: Tokens that take up capacity; others (padding) are left out. By default all; only with a capacity.
    """
    flat = experts.flatten()
    if capacity is not None and counted is not None:
        flat = flat.masked_fill(~counted.repeat_interleave(experts.size(1)), num_experts)
    ranked, order = flat.sort(stable=True)
    edges = torch.searchsorted(ranked, torch.arange(num_experts + 1, device=flat.device, dtype=flat.dtype))
    counts = edges.diff()
    if capacity is not None:
        first = edges[ranked.clamp(max=num_experts - 1)]
        place = torch.arange(len(ranked), device=flat.device) - first
        order = order[(place < capacity) & (ranked < num_experts)]
        counts = counts.clamp(max=capacity)
    return Assignment(order, counts, experts.size(1))


def collect_tokens(x: Float[Tensor, "tokens d_model"], assignment: Assignment) -> Float[Tensor, "rows d_model"]:
    """Return the features of the token of each row.

    Args:
        x: Features of the tokens.
        assignment: Result of `group_by_expert`.
    """
    if x.device.type == "cpu":
        return x.index_select(0, assignment.tokens)
    # A GPU adds up what several rows give to one token in any order; of unique places the sum over choices is exact.
    return x.repeat_interleave(assignment.chosen, 0).index_select(0, assignment.order)


def combine(
    rows: Float[Tensor, "rows d_model"], assignment: Assignment, num_tokens: int
) -> Float[Tensor, "tokens d_model"]:
    """Add up the rows of each token; a token whose choices were all dropped gets zeros.

    Args:
        rows: Outputs of the experts, multiplied by their weights.
        assignment: Result of `group_by_expert`.
        num_tokens: Number of tokens.
    """
    if rows.device.type == "cpu":
        return rows.new_zeros(num_tokens, rows.size(1)).index_add(0, assignment.tokens, rows)
    places = rows.new_zeros(num_tokens * assignment.chosen, rows.size(1)).index_copy(0, assignment.order, rows)
    return places.view(num_tokens, assignment.chosen, -1).sum(1)


def count_choices(
    experts: Int[Tensor, "tokens chosen"], num_experts: int, counted: Bool[Tensor, " tokens"] | None = None
) -> Int[Tensor, " experts"]:
    """Return how often each expert was chosen.

    Args:
        experts: Chosen experts of each token.
        num_experts: Number of experts.
        counted: Tokens that count; by default all.
    """
    ones = torch.ones_like(experts) if counted is None else counted.to(experts.dtype)[:, None].expand_as(experts)
    zeros = torch.zeros(num_experts, dtype=experts.dtype, device=experts.device)
    return zeros.scatter_add(0, experts.flatten(), ones.flatten())


def distribution(logits: Float[Tensor, "tokens experts"], score: Score) -> Float[Tensor, "tokens experts"]:
    """Return scores that add up to one for each token, as the losses that balance the load need them.

    Args:
        logits: Output of the router, in float32 or better.
        score: Kind of the scores; sigmoids are divided by their sum.
    """
    if score != "sigmoid":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def lagged_balance_loss(
    shares: Float[Tensor, "tokens experts"],
    fractions: Float[Tensor, " experts"],
    counted: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Return the sum over tokens of ``experts * sum_i fractions_i shares_i``: 1 per token if the load is uniform.

    This is the load-balancing loss with the loads of the optimizer step before in place of those of the batch. It is
    linear in tokens, so micro-batches and ranks add up exactly.

    Args:
        shares: Result of `distribution`.
        fractions: Fraction of all choices that each expert got in the last optimizer step; constant.
        counted: Tokens that count; by default all.

    Source:
        Fedus et al. 2021 (Switch), arXiv:2101.03961, equations 4 to 6; over the global batch: Qiu et al. 2025,
        arXiv:2501.11873.
    """
    per_token = shares.size(-1) * (shares @ fractions.to(shares.dtype))
    return _sum_counted(per_token, counted)


def sequence_balance_loss(
    shares: Float[Tensor, "tokens experts"],
    experts: Int[Tensor, "tokens chosen"],
    sequences: Int[Tensor, " tokens"],
    counted: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Return the load-balancing loss of each sequence by itself, times its tokens, summed: 1 per token if uniform.

    Args:
        shares: Result of `distribution`.
        experts: Chosen experts of each token.
        sequences: Index of the sequence of each token, below the number of tokens.
        counted: Tokens that count; by default all.

    Source:
        DeepSeek-V3, arXiv:2412.19437, equations 17 to 20.
    """
    num_experts, chosen = shares.size(-1), experts.size(-1)
    mask = shares.new_ones(len(shares), 1) if counted is None else counted[:, None].to(shares.dtype)
    empty = torch.zeros_like(shares)
    sums = empty.index_add(0, sequences, shares * mask)
    loads = empty.index_add(0, sequences, empty.scatter_add(1, experts, mask.expand(-1, chosen)).detach())
    lengths = mask.new_zeros(len(shares)).index_add(0, sequences, mask[:, 0])
    return (num_experts / chosen) * ((loads * sums).sum(-1) / lengths.clamp(min=1)).sum()


def router_z_loss(
    logits: Float[Tensor, "tokens experts"], counted: Bool[Tensor, " tokens"] | None = None
) -> Float[Tensor, ""]:
    """Return the sum over tokens of the squared log-normaliser, which keeps router logits from growing.

    Args:
        logits: Output of the router, in float32 or better.
        counted: Tokens that count; by default all.

    Source:
        Zoph et al. 2022 (ST-MoE), arXiv:2202.08906, equation 5.
    """
    return _sum_counted(logits.logsumexp(-1).square(), counted)


def _sum_counted(per_token: Tensor, counted: Tensor | None) -> Tensor:
    return (per_token if counted is None else torch.where(counted, per_token, 0)).sum()


def balanced_bias(
    bias: Float[Tensor, " experts"], counts: Float[Tensor, " experts"], rate: float
) -> Float[Tensor, " experts"]:
    """Return the bias after an optimizer step: raised for experts with less than the mean load, lowered for others.

    The mean of the change is taken off, so that the bias stays centred.

    Args:
        bias: Bias of each expert, float32.
        counts: Choices of each expert over all ranks and micro-batches of the step.
        rate: Size of a step. Units of a score.

    Source:
        Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """
    counts = to_accumulate(counts)
    change = rate * torch.sign(counts.mean() - counts).to(bias.dtype)
    return bias + (change - change.mean())

"""Routing, sorting by expert and the balancing losses, against loops over tokens in float64."""

import math

import pytest
import torch

from lightning_lm.functional.experts import (
    balanced_bias,
    collect_tokens,
    combine,
    count_choices,
    distribution,
    group_by_expert,
    lagged_balance_loss,
    route,
    router_z_loss,
    sequence_balance_loss,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def route_one(logits, k, score, normalise, scale, bias):
    """The formula for one token, in plain Python."""
    logits = logits.tolist()
    if score == "softmax":
        total = sum(map(math.exp, logits))
        scores = [math.exp(value) / total for value in logits]
    else:
        scores = [1 / (1 + math.exp(-value)) for value in logits] if score == "sigmoid" else logits
    best = sorted(range(len(scores)), key=lambda index: -(scores[index] + bias[index]))[:k]
    weights = [scores[index] for index in best]
    if score == "chosen_softmax":
        weights = [math.exp(weight) / sum(map(math.exp, weights)) for weight in weights]
    total = sum(weights) if normalise else 1.0
    return best, [scale * weight / total for weight in weights]


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "chosen_softmax"])
@pytest.mark.parametrize("normalise", [False, True])
def test_weights_are_the_scores_without_the_bias_that_decides_the_choice(score, normalise):
    logits, bias = draw(20, 6), draw(6, seed=1)
    found = route(logits, 3, score=score, normalise=normalise, scale=2.5, bias=bias)
    for token in range(20):
        experts, weights = route_one(logits[token], 3, score, normalise, 2.5, bias.tolist())
        assert found.experts[token].tolist() == experts
        assert found.weights[token].tolist() == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize("best", [1, 2])
def test_groups_leave_the_experts_of_the_best_groups(best):
    logits = draw(30, 12)
    experts = route(logits, 3, score="sigmoid", groups=(4, 2, best)).experts
    for row, chosen in zip(logits.sigmoid().tolist(), experts.tolist(), strict=True):
        groups = [row[3 * index : 3 * index + 3] for index in range(4)]
        order = sorted(range(4), key=lambda index: -sum(sorted(groups[index])[-best:]))[:2]
        allowed = [3 * group + place for group in order for place in range(3)]
        assert chosen == sorted(allowed, key=lambda index: -row[index])[:3]


def test_tokens_there_and_back_are_a_sum_over_choices():
    x, experts = draw(9, 4), draw(9, 5).topk(2).indices
    assignment = group_by_expert(experts, 5)
    assert assignment.counts.tolist() == [int((experts == expert).sum()) for expert in range(5)]
    sorted_experts = experts.flatten()[assignment.order]
    assert (sorted_experts.diff() >= 0).all()
    assert torch.equal(collect_tokens(x, assignment), x[assignment.tokens])
    assert torch.equal(combine(collect_tokens(x, assignment), assignment, 9), 2 * x)


def test_all_tokens_may_choose_one_expert_and_none_may_be_there():
    assignment = group_by_expert(torch.full((6, 1), 2), 4)
    assert assignment.counts.tolist() == [0, 0, 6, 0]
    assert assignment.order.tolist() == list(range(6))
    empty = group_by_expert(torch.empty(0, 2, dtype=torch.int64), 3)
    assert empty.counts.tolist() == [0, 0, 0]


def test_beyond_its_capacity_an_expert_drops_the_latest_tokens_and_padding_takes_none():
    experts = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1]])
    counted = torch.tensor([True, False, True, True])
    assignment = group_by_expert(experts, 3, capacity=2, counted=counted)
    assert assignment.counts.tolist() == [2, 2, 0]
    assert assignment.order.tolist() == [0, 4, 1, 5]
    assert combine(torch.ones(4, 1), assignment, 4).flatten().tolist() == [2, 0, 2, 0]
    assert count_choices(experts, 3, counted).tolist() == [3, 3, 0]


def test_the_lagged_loss_is_one_per_token_for_uniform_loads_and_the_number_of_experts_after_collapse():
    collapsed = torch.full((7, 4), -1e4).index_fill(1, torch.tensor([2]), 0.0)
    one_hot = torch.zeros(4).index_fill(0, torch.tensor([2]), 1.0)
    assert float(lagged_balance_loss(distribution(draw(7, 4), "softmax"), torch.full((4,), 0.25))) == pytest.approx(7)
    assert float(lagged_balance_loss(distribution(collapsed, "softmax"), one_hot)) == pytest.approx(28)
    shares = distribution(draw(7, 4), "sigmoid")
    assert shares.sum(-1).tolist() == pytest.approx([1.0] * 7)


def test_the_loss_of_sequences_is_that_of_each_document_times_its_tokens():
    logits = draw(10, 4)
    shares, experts = distribution(logits, "softmax"), logits.topk(2).indices
    sequences = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
    counted = torch.tensor([True] * 8 + [False] * 2)
    total = 0.0
    for begin, end in ((0, 3), (3, 8)):
        length = end - begin
        loads = [int((experts[begin:end] == expert).sum()) * 4 / (2 * length) for expert in range(4)]
        means = shares[begin:end].mean(0).tolist()
        total += length * sum(load * mean for load, mean in zip(loads, means, strict=True))
    assert float(sequence_balance_loss(shares, experts, sequences, counted)) == pytest.approx(total, rel=1e-12)
    assert float(router_z_loss(logits, counted)) == pytest.approx(
        sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits[:8].tolist()), rel=1e-12
    )


def test_the_bias_moves_by_the_sign_of_the_load_and_stays_centred():
    bias = balanced_bias(torch.zeros(4), torch.tensor([10.0, 2.0, 4.0, 4.0]), 1e-3)
    assert bias.tolist() == pytest.approx([-1.5e-3, 0.5e-3, 0.5e-3, 0.5e-3])
    assert balanced_bias(torch.zeros(2), torch.tensor([3.0, 3.0]), 1e-3).tolist() == [0, 0]

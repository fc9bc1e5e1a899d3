"""Policy losses against hand-written formulas, exact expectations, and the property that micro-batches add up."""

import math

import pytest
import torch

from lightning_lm.functional.policy import (
    CISPO,
    GSPO,
    ClippedSurrogate,
    ConstantLength,
    KLPenalty,
    PolicyGradient,
    PolicyLoss,
    Reduction,
    RolloutTokenMean,
    SequenceMean,
    TokenMean,
    clipped_value_loss,
    kl_estimate,
)
from lightning_lm.parts import Part

LOSSES = [
    PolicyGradient(),
    ClippedSurrogate(),
    ClippedSurrogate(clip_high=0.3, dual_clip=2.0),
    GSPO(clip_low=0.1, clip_high=0.2),
    CISPO(),
]
REDUCTIONS = [TokenMean(), RolloutTokenMean(), SequenceMean(), ConstantLength(max_tokens=9)]


def rollout(rows: int = 12, seq: int = 6) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(rows, seq, generator=generator, dtype=torch.float64) * 3
    new = old + 0.4 * torch.randn(rows, seq, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, 1, generator=generator, dtype=torch.float64).expand(rows, seq)
    lengths = torch.randint(0, seq + 1, (rows, 1), generator=generator)
    return new, old, advantages, torch.arange(seq) < lengths


def test_clipped_surrogate_token_by_token() -> None:
    new, old, advantages, mask = rollout()
    terms = ClippedSurrogate(clip_low=0.1, clip_high=0.3, dual_clip=2.0)(new, old, advantages, mask)
    for index in range(new.numel()):
        n, o, a = (t.flatten()[index].item() for t in (new, old, advantages.contiguous()))
        ratio = math.exp(n - o)
        objective = min(ratio * a, min(max(ratio, 0.9), 1.3) * a)
        objective = max(objective, 2.0 * a) if a < 0 else objective
        assert terms.loss.flatten()[index].item() == pytest.approx(-objective, rel=1e-12)
        assert terms.clipped_high.flatten()[index].item() == (ratio > 1.3 and a > 0)
        assert terms.clipped_low.flatten()[index].item() == (ratio < 0.9 and a < 0)


def test_gspo_has_one_ratio_a_sequence_and_its_gradient() -> None:
    new, old, advantages, mask = rollout(4)
    mask[:] = torch.tensor([[1, 1, 1, 0, 0, 0]]).bool()
    new = (old + 1e-3).requires_grad_()
    terms = GSPO(clip_low=0.5, clip_high=0.5)(new, old, advantages, mask)
    (terms.loss * mask / 3).sum().backward()
    ratio = math.exp(1e-3)
    torch.testing.assert_close(terms.loss, -ratio * advantages)
    torch.testing.assert_close(new.grad[mask], (-ratio * advantages / 3)[mask])
    assert torch.equal(new.grad[~mask], torch.zeros(12, dtype=torch.float64))


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    old, new = torch.tensor([[-3.0]]), torch.tensor([[-0.5]], requires_grad=True)
    one, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    terms = CISPO(clip_high=1.0)(new, old, one, mask)
    terms.loss.sum().backward()
    assert new.grad.item() == -2.0
    assert terms.clipped_high.item()
    leaf = new.detach().requires_grad_()
    ClippedSurrogate()(leaf, old, one, mask).loss.sum().backward()
    assert leaf.grad.item() == 0.0  # the clipped surrogate has none left


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda reduction: type(reduction).__name__)
def test_gradients_do_not_depend_on_the_micro_batches(loss: PolicyLoss, reduction: Reduction) -> None:
    new, old, advantages, mask = rollout()
    mask[3:6] = False  # a micro-batch without a single token
    tokens_per_row = mask.sum() / 12

    def gradient(size: int) -> torch.Tensor:
        leaf, count = new.clone().requires_grad_(), torch.zeros(())
        for rows in torch.arange(len(new)).split(size):
            terms = loss(leaf[rows], old[rows], advantages[rows], mask[rows])
            (terms.loss * reduction.weights(mask[rows])).sum().backward()
            count += reduction.count(mask[rows], tokens_per_row)
        return leaf.grad / count

    whole = gradient(12)
    assert whole.abs().sum() > 0
    for size in (1, 3, 5):
        torch.testing.assert_close(gradient(size), whole, rtol=1e-6, atol=1e-9)
    assert torch.equal(whole[~mask], torch.zeros_like(whole[~mask]))
    assert Part.from_dict(loss.to_dict()) == loss


def test_reductions_weigh_as_defined() -> None:
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()

    def shares(reduction: Reduction) -> list[float]:
        return (reduction.weights(mask).sum(-1) / reduction.count(mask, 10 / 3)).tolist()

    assert shares(TokenMean()) == pytest.approx([0.2, 0.8, 0])
    assert shares(RolloutTokenMean()) == pytest.approx([0.1, 0.4, 0])
    assert shares(SequenceMean()) == pytest.approx([0.5, 0.5, 0])
    assert shares(ConstantLength(max_tokens=8)) == pytest.approx([1 / 16, 4 / 16, 0])
    for reduction in (TokenMean(), SequenceMean(), ConstantLength(max_tokens=8)):
        assert reduction.count(mask[2:], 0.0).item() == 0
        assert torch.equal(reduction.weights(mask[2:]), torch.zeros(1, 4))


def exact_reverse_kl(theta: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    policy = torch.log_softmax(theta, -1)
    return (policy.exp() * (policy - reference)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_unbiased_kl_gradient_is_the_reverse_kl_in_expectation(estimator: str, off_policy: bool) -> None:
    """The expectation over the sampling policy is summed exactly over a vocabulary of 50."""
    torch.manual_seed(0)
    theta = torch.randn(50, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.randn(50, dtype=torch.float64), -1)
    old = torch.log_softmax(theta.detach() + (0.3 * torch.randn(50).double() if off_policy else 0), -1)
    (exact,) = torch.autograd.grad(exact_reverse_kl(theta, reference), theta)
    policy = torch.log_softmax(theta, -1)
    penalty = KLPenalty(estimator=estimator)(policy[None], reference[None], old[None])[0]
    (ours,) = torch.autograd.grad((old.exp() * penalty).sum(), theta)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def test_plain_k3_has_the_gradient_of_the_other_kl() -> None:
    """Why ``unbiased`` is the default: differentiating k3 itself gives the forward KL, k1 gives nothing."""
    torch.manual_seed(0)
    theta = torch.randn(50, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.randn(50, dtype=torch.float64), -1)
    policy = torch.log_softmax(theta, -1)
    weights = policy.detach().exp()

    def gradient(estimator: str) -> torch.Tensor:
        plain = KLPenalty(estimator=estimator, unbiased=False)(policy[None], reference[None], policy.detach()[None])
        return torch.autograd.grad((weights * plain[0]).sum(), theta, retain_graph=True)[0]

    (forward,) = torch.autograd.grad(-(reference.exp() * policy).sum(), theta, retain_graph=True)
    torch.testing.assert_close(gradient("k3"), forward, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient("k1"), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_values_are_unbiased(estimator: str) -> None:
    torch.manual_seed(0)
    policy, reference = (torch.log_softmax(torch.randn(50, dtype=torch.float64), -1) for _ in range(2))
    mean = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()
    torch.testing.assert_close(mean, exact_reverse_kl(policy, reference))


def test_extreme_ratios_are_finite() -> None:
    new = torch.tensor([[50.0, -50.0, 0.0]], requires_grad=True)
    zeros, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    for loss in LOSSES:
        value = loss(new, zeros, torch.tensor([[1.0, -1.0, 1.0]]), mask).loss.sum()
        (gradient,) = torch.autograd.grad(value, new)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
    penalty = KLPenalty()(new, zeros, zeros)
    assert torch.isfinite(torch.autograd.grad(penalty.sum(), new)[0]).all()
    assert torch.isfinite(penalty).all()


def test_value_clipping() -> None:
    values, old, returns = torch.tensor([[1.0, 0.1, -1.0]]), torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 1.0]])
    assert clipped_value_loss(values, old, returns).tolist()[0] == pytest.approx([0.32, 0.405, 2.0])
    assert clipped_value_loss(values, old, returns, clip=None).tolist()[0] == pytest.approx([0.0, 0.405, 2.0])

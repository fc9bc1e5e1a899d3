"""Losses whose logits are shared out by vocabulary, against torch on all logits in float64."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.flop_counter import FlopCounterMode

from lightning_lm.errors import ConfigurationError
from lightning_lm.kernels import (
    force_backend,
    linear_cross_entropy,
    linear_logprob,
    linear_nll,
    measured_cross_entropy,
    register_flops,
)
from lightning_lm.kernels.lm_head import head as heads
from lightning_lm.kernels.lm_head import logits as vocabulary
from lightning_lm.kernels.lm_head.vocab_parallel import AXIS

OPTIONS = [
    {},
    {"softcap": 5.0},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.1},
    {"softcap": 3.0, "z_loss": 1e-2, "label_smoothing": 0.2},
]


def problem(vocab_size, rows=12, scale=1.0):
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(rows, 16, generator=generator) * scale
    weight, bias = torch.randn(vocab_size, 16, generator=generator), torch.randn(vocab_size, generator=generator)
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    targets[3:5] = -100
    return hidden, weight, bias, targets


def split(tensor, axis=AXIS):
    """Return a leaf whose rows are shared among all ranks."""
    size, rank = distributed.get_world_size(), distributed.get_rank()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=(axis,))
    stretch = -(-len(tensor) // size)
    mine = tensor[stretch * rank : stretch * (rank + 1)].clone()
    stride = tensor.stride()
    return DTensor.from_local(mine, mesh, [Shard(0)], shape=tensor.shape, stride=stride).requires_grad_()


def loss_of(vocab_size, options, scale=1.0):
    hidden, weight, bias, targets = problem(vocab_size, scale=scale)
    hidden, weight, bias = hidden.requires_grad_(), split(weight), split(bias)
    # Several chunks, the last one shorter: torch makes six matrices of a rank's logits.
    budget = 5 * 28 * -(-vocab_size // distributed.get_world_size())
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, budget_bytes=budget, **options)
    (loss.loss_sum * 0.5).backward()
    gradients = hidden.grad, weight.grad.full_tensor(), bias.grad.full_tensor()
    return loss.loss_sum.detach(), loss.nll_sum, loss.num_tokens, gradients


def oracle(vocab_size, options, scale=1.0):
    hidden, weight, bias, targets = problem(vocab_size, scale=scale)
    leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = leaves[0] @ leaves[1].T + leaves[2]
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    smoothing = options.get("label_smoothing", 0.0)
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    loss = loss + options.get("z_loss", 0.0) * logits.logsumexp(-1).square()[targets != -100].sum()
    (loss * 0.5).backward()
    return loss.detach(), F.cross_entropy(logits, targets, reduction="sum").detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("size", "vocab_size"), [(2, 96), (2, 97), (3, 4)], ids=["even", "uneven", "a rank without"])
def test_loss_and_gradients_are_those_of_all_logits(ranks, size, vocab_size, options):
    loss, nll, gradients = oracle(vocab_size, options)
    for found_loss, found_nll, count, found in ranks(size).run(loss_of, vocab_size, options):
        assert count == 10
        torch.testing.assert_close(found_loss.double(), loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found_nll.double(), nll, rtol=1e-6, atol=1e-6)
        for mine, expected in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-6)


def in_parts(vocab_size, options):
    """Let torch make its temporary matrices of two rows of a rank's logits; a piece has five."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (heads, vocabulary):
            patch.setattr(module, "WORK_BYTES", 2 * 24 * -(-vocab_size // distributed.get_world_size()))
        return loss_of(vocab_size, options)


def test_parts_of_a_piece(ranks):
    loss, nll, gradients = oracle(97, OPTIONS[-1])
    for found_loss, found_nll, _, found in ranks(2).run(in_parts, 97, OPTIONS[-1]):
        torch.testing.assert_close(found_loss.double(), loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found_nll.double(), nll, rtol=1e-6, atol=1e-6)
        for mine, expected in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-6)


def test_huge_logits_stay_finite(ranks):
    loss, _, gradients = oracle(97, {}, scale=1e4)
    for found, _, _, found_gradients in ranks(2).run(loss_of, 97, {}, scale=1e4):
        torch.testing.assert_close(found.double(), loss, rtol=1e-6, atol=0)
        assert all(gradient.isfinite().all() for gradient in found_gradients)
        torch.testing.assert_close(found_gradients[0].double(), gradients[0], rtol=1e-4, atol=1e-4)


def scores_of(entropy_gradient):
    hidden, weight, bias, targets = problem(97)
    hidden, weight, bias = hidden.requires_grad_(), split(weight), split(bias)
    options = {"bias": bias, "temperature": 0.7, "softcap": 4.0, "entropy_gradient": entropy_gradient}
    scores = linear_logprob(hidden, weight, targets.clamp(min=0), budget_bytes=5 * 28 * 49, **options)
    total = (scores.logprobs * torch.arange(12)).sum() + (scores.entropies.sum() if entropy_gradient else 0)
    total.backward()
    return scores.logprobs.detach(), scores.entropies.detach(), hidden.grad, weight.grad.full_tensor()


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_scores_of_tokens(ranks, entropy_gradient):
    hidden, weight, bias, targets = problem(97)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = 4.0 * torch.tanh((hidden @ weight.T + bias.double()) / 4.0) / 0.7
    distribution = torch.distributions.Categorical(logits=logits)
    logprobs, entropies = distribution.log_prob(targets.clamp(min=0)), distribution.entropy()
    ((logprobs * torch.arange(12)).sum() + (entropies.sum() if entropy_gradient else 0)).backward()
    for found in ranks(2).run(scores_of, entropy_gradient):
        for mine, expected in zip(found, (logprobs, entropies, hidden.grad, weight.grad), strict=True):
            torch.testing.assert_close(mine.double(), expected.detach(), rtol=1e-5, atol=1e-5)


def measured(vocab_size, hidden_scale):
    hidden, weight, _, targets = problem(vocab_size, scale=hidden_scale)
    result = measured_cross_entropy(hidden, split(weight), targets)
    return result.entropy_sum, result.num_correct, linear_nll(hidden, split(weight), targets)


@pytest.mark.parametrize(("size", "vocab_size", "scale"), [(2, 97, 1.0), (3, 4, 1.0), (2, 97, 1e4)])
def test_what_is_measured_along_with_the_loss(ranks, size, vocab_size, scale):
    hidden, weight, _, targets = problem(vocab_size, scale=scale)
    logits = hidden.double() @ weight.double().T
    nll = F.cross_entropy(logits, targets, reduction="none")
    logits, targets = logits[targets != -100], targets[targets != -100]
    entropy = torch.special.entr(logits.softmax(-1)).sum()
    correct = (logits.argmax(-1) == targets).sum()
    for found_entropy, found_correct, found_nll in ranks(size).run(measured, vocab_size, scale):
        torch.testing.assert_close(found_entropy.double(), entropy, rtol=1e-6, atol=1e-6)
        assert found_correct == correct
        torch.testing.assert_close(found_nll.double(), nll, rtol=1e-6, atol=1e-5)


def confidence():
    hidden, weight, _, targets = problem(97)
    hidden, weight = hidden.requires_grad_(), split(weight)
    measured_cross_entropy(hidden, weight, targets, by_confidence=True).loss.loss_sum.backward()
    return hidden.grad, weight.grad.full_tensor()


def test_a_loss_weighted_by_confidence(ranks):
    hidden, weight, _, targets = problem(97)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    nll = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    (nll * nll.detach().neg().exp() * (targets != -100)).sum().backward()
    for found in ranks(2).run(confidence):
        for mine, expected in zip(found, (hidden.grad, weight.grad), strict=True):
            torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-6)


def by_triton():
    with force_backend("triton"):
        return loss_of(97, {"softcap": 3.0, "z_loss": 1e-2, "label_smoothing": 0.2}), scores_of(True)


def test_by_triton_as_by_torch(ranks):
    pytest.importorskip("triton")
    options = {"softcap": 3.0, "z_loss": 1e-2, "label_smoothing": 0.2}
    by_torch = ranks(2).run(loss_of, 97, options), ranks(2).run(scores_of, True)
    for (loss, scores), expected_loss, expected_scores in zip(ranks(2).run(by_triton), *by_torch, strict=True):
        for mine, expected in zip((*loss[:3], *loss[3]), (*expected_loss[:3], *expected_loss[3]), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        for mine, expected in zip(scores, expected_scores, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def watched():
    """The same by the custom operator, which is taken where something listens to operations."""
    hidden, weight, _, targets = problem(97)
    hidden, weight = hidden.requires_grad_(), split(weight)
    register_flops()
    results = []
    for watch in (contextlib.nullcontext(), FlopCounterMode(display=False)):
        with watch:
            loss = linear_cross_entropy(hidden, weight, targets, softcap=3.0).loss_sum
            score = linear_logprob(hidden, weight, targets, entropy_gradient=True)
            total = loss + (score.logprobs * torch.arange(12)).sum() + score.entropies.sum()
            results.append(torch.autograd.grad(total, (hidden, weight)))
    eager, operator = results
    assert torch.equal(eager[0], operator[0])
    assert torch.equal(eager[1].to_local(), operator[1].to_local())
    return watch.get_total_flops()


def test_by_the_operator_each_rank_counts_its_own_products(ranks):
    one_product = 2 * 12 * 16
    assert ranks(2).run(watched) == [(3 + 4) * one_product * 49, (3 + 4) * one_product * 48]


def with_a_head_sharded_for_data():
    hidden, weight, _, targets = problem(97)
    with pytest.raises(ConfigurationError, match=r"sharded over \('data_parallel',\)"):
        linear_cross_entropy(hidden, split(weight, "data_parallel"), targets)


def test_a_head_that_is_sharded_over_ranks_with_other_data_is_refused(ranks):
    ranks(2).run(with_a_head_sharded_for_data)

"""Losses whose logits are shared out by vocabulary, against torch on all logits in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional import linear_cross_entropy, linear_token_scores, measured_cross_entropy
from lightning_lm.functional.cross_entropy import _CHUNK_ELEMENTS
from lightning_lm.functional.vocab_parallel import AXIS

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
    _CHUNK_ELEMENTS["cpu"] = 5 * vocab_size  # several chunks, the last one shorter
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, **options)
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


def test_huge_logits_stay_finite(ranks):
    loss, _, gradients = oracle(97, {}, scale=1e4)
    for found, _, _, found_gradients in ranks(2).run(loss_of, 97, {}, scale=1e4):
        torch.testing.assert_close(found.double(), loss, rtol=1e-6, atol=0)
        assert all(gradient.isfinite().all() for gradient in found_gradients)
        torch.testing.assert_close(found_gradients[0].double(), gradients[0], rtol=1e-4, atol=1e-4)


def scores_of(entropy_gradient):
    hidden, weight, bias, targets = problem(97)
    hidden, weight, bias = hidden.requires_grad_(), split(weight), split(bias)
    options = {"bias": bias, "temperature": 0.7, "softcap": 4.0, "entropy_gradient": entropy_gradient, "chunk": 5}
    scores = linear_token_scores(hidden, weight, targets.clamp(min=0), **options)
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


def measured():
    hidden, weight, _, targets = problem(97)
    result = measured_cross_entropy(hidden, split(weight), targets)
    return result.entropy_sum, result.num_correct


def test_what_is_measured_along_with_the_loss(ranks):
    hidden, weight, _, targets = problem(97)
    logits = (hidden.double() @ weight.double().T)[targets != -100]
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    correct = (logits.argmax(-1) == targets[targets != -100]).sum()
    for found_entropy, found_correct in ranks(2).run(measured):
        torch.testing.assert_close(found_entropy.double(), entropy, rtol=1e-6, atol=0)
        assert found_correct == correct


def with_a_head_sharded_for_data():
    hidden, weight, _, targets = problem(97)
    with pytest.raises(ConfigurationError, match=r"sharded over \('data_parallel',\)"):
        linear_cross_entropy(hidden, split(weight, "data_parallel"), targets)


def test_a_head_that_is_sharded_over_ranks_with_other_data_is_refused(ranks):
    ranks(2).run(with_a_head_sharded_for_data)

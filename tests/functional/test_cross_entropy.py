"""Token cross-entropy, from logits and straight from features, against float64 written out, and at the extremes."""

import math

import pytest
import torch
from torch import Tensor

from lightning_lm.functional.cross_entropy import token_cross_entropy
from lightning_lm.kernels import linear_cross_entropy
from lightning_lm.types import IGNORE_INDEX

# Sums of about 40 float32 terms of size one: relative rounding below 1e-6.
FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}
# bfloat16 keeps 8 bits; products of 16 features of size one.
BFLOAT16 = {"rtol": 2e-2, "atol": 2e-2}
OPTIONS = [
    {},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"softcap": 2.0, "z_loss": 1e-3, "label_smoothing": 0.2},
]


def naive(logits: Tensor, targets: Tensor, softcap=None, z_loss=0.0, label_smoothing=0.0) -> tuple[Tensor, float, int]:
    """Row by row, from the definition, in float64."""
    logits = logits.double()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss, nll, count = logits.new_zeros(()), 0.0, 0
    for row, target in zip(logits, targets.tolist(), strict=True):
        if target == IGNORE_INDEX:
            continue
        peak = row.max().detach()
        normaliser = peak + (row - peak).exp().sum().log()
        log_probs = row - normaliser
        wanted = torch.full_like(row, label_smoothing / len(row))
        wanted[target] += 1 - label_smoothing
        loss = loss - (wanted * log_probs).sum() + z_loss * normaliser**2
        nll -= log_probs[target].item()
        count += 1
    return loss, nll, count


def problem(rows: int = 37, d_model: int = 16, vocab: int = 23) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, d_model, generator=generator)
    weight = torch.randn(vocab, d_model, generator=generator)
    bias = torch.randn(vocab, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[::5] = IGNORE_INDEX
    return hidden, weight, bias, targets


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.fixture(params=[1, 7, 10**6], ids=["one row", "ragged chunks", "one chunk"])
def budget_bytes(request):
    """As many rows at once, by torch on a CPU, which makes six matrices of the logits."""
    return request.param * 23 * 7 * 4


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_matches_the_definition(budget_bytes, options, with_bias):
    hidden, weight, bias, targets = problem()
    ours, theirs = leaves(hidden, weight, bias), leaves(hidden.double(), weight.double(), bias.double())
    bias = ours[2] if with_bias else None
    result = linear_cross_entropy(*ours[:2], targets, bias=bias, budget_bytes=budget_bytes, **options)
    logits = theirs[0] @ theirs[1].T + (theirs[2] if with_bias else 0)
    loss, nll, count = naive(logits, targets, **options)
    torch.testing.assert_close(result.loss_sum.double(), loss, **FLOAT32)
    assert result.nll_sum.item() == pytest.approx(nll, rel=1e-6)
    assert result.num_tokens.item() == count
    (3 * result.loss_sum).backward()
    (3 * loss).backward()
    for mine, other in zip(ours[: 2 + with_bias], theirs, strict=False):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [option for option in OPTIONS if "softcap" not in option], ids=str)
def test_from_logits_matches_the_definition(options):
    hidden, weight, _, targets = problem()
    mine, other = leaves(hidden @ weight.T, (hidden @ weight.T).double())
    result = token_cross_entropy(mine, targets, **options)
    loss, nll, count = naive(other, targets, **options)
    torch.testing.assert_close(result.loss_sum.double(), loss, **FLOAT32)
    assert result.nll_sum.item() == pytest.approx(nll, rel=1e-6)
    assert result.num_tokens.item() == count
    result.loss_sum.backward()
    loss.backward()
    torch.testing.assert_close(mine.grad.double(), other.grad, **FLOAT32)


def test_matches_torch_in_float64():
    hidden, weight, _, targets = problem()
    ours, theirs = leaves(hidden.double(), weight.double()), leaves(hidden.double(), weight.double())
    loss = linear_cross_entropy(*ours, targets, label_smoothing=0.1).loss_sum
    reference = torch.nn.functional.cross_entropy(
        theirs[0] @ theirs[1].T, targets, reduction="sum", label_smoothing=0.1
    )
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, reference, rtol=1e-13, atol=1e-13)
    loss.backward()
    reference.backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_rows_keep_their_shape():
    hidden, weight, _, targets = problem(rows=36)
    flat = linear_cross_entropy(hidden, weight, targets)
    shaped = linear_cross_entropy(hidden.view(4, 9, 16), weight, targets.view(4, 9))
    assert flat == shaped


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size):
    hidden = torch.tensor([[size], [size], [size]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    targets = torch.tensor([0, 1, 2])
    result = linear_cross_entropy(hidden, weight, targets)
    # The best of the three logits is |size|; its target costs nothing, the opposite one 2e4, the middle one 1e4.
    assert result.loss_sum.item() == 3e4
    assert token_cross_entropy(hidden.detach() @ weight.detach().T, targets).nll_sum.item() == 3e4
    result.loss_sum.backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_bfloat16_logits_are_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(300, 152, generator=generator)).bfloat16()
    targets = torch.randint(152, (300,), generator=generator)
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum").item()
    assert token_cross_entropy(logits, targets).nll_sum.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16 parameters"])
def test_half_precision_products(autocast):
    hidden, weight, _, targets = problem()
    exact = leaves(hidden.bfloat16().double(), weight.bfloat16().double())
    naive(exact[0] @ exact[1].T, targets)[0].backward()
    mine = leaves(hidden, weight) if autocast else leaves(hidden.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = linear_cross_entropy(*mine, targets)
    assert result.loss_sum.dtype == torch.float32
    result.loss_sum.backward()
    for ours, theirs in zip(mine, exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2e-2, atol=6e-2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_to_learn_gives_zero_and_a_zero_gradient(options):
    hidden, weight, bias, _ = problem()
    inputs = leaves(hidden, weight, bias)
    targets = torch.full((37,), IGNORE_INDEX)
    result = linear_cross_entropy(*inputs[:2], targets, bias=inputs[2], **options)
    assert (result.loss_sum.item(), result.nll_sum.item(), result.num_tokens.item()) == (0, 0, 0)
    result.loss_sum.backward()
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in inputs)


def test_no_rows():
    hidden, weight = leaves(torch.zeros(0, 4), torch.ones(5, 4))
    result = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long))
    result.loss_sum.backward()
    assert result.num_tokens.item() == 0
    assert weight.grad.abs().sum().item() == 0


def test_ignored_rows_may_hold_anything():
    logits = torch.tensor([[math.nan, math.inf], [0.0, 0.0]])
    result = token_cross_entropy(logits, torch.tensor([IGNORE_INDEX, 1]))
    assert result.nll_sum.item() == pytest.approx(math.log(2))


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    result = linear_cross_entropy(torch.zeros(11, 4), torch.ones(256, 4), torch.arange(11))
    assert result.nll_sum.item() / result.num_tokens.item() == pytest.approx(math.log(256), rel=1e-7)

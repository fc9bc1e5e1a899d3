import pytest
import torch
import torch.nn.functional as F

from lightning_lm import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TERMS = [
    {},
    {"z_loss": 1e-2, "label_smoothing": 0.1},
    {"softcap": 3.0},
    {"softcap": 30.0, "z_loss": 1e-3, "label_smoothing": 0.3},
]


def oracle(logits, targets, *, softcap=None, z_loss=0.0, label_smoothing=0.0, weights=None):
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * torch.where(targets == -100, 0, logits.logsumexp(-1)) ** 2
    return (losses if weights is None else losses * weights).sum()


def made(rows, vocab, dtype=torch.float32, scale=3.0):
    targets = torch.randint(0, vocab, (rows,))
    targets[1::3] = -100
    return (scale * torch.randn(rows, vocab)).to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 33, 1000, 4100])
@pytest.mark.parametrize("terms", TERMS, ids=["plain", "terms", "capped", "all"])
def test_cross_entropy(backend, agree, terms, vocab, dtype):
    logits, targets = made(4, vocab, dtype)
    agree(
        lambda x: kernels.cross_entropy(x, targets, **terms).loss_sum,
        lambda x: oracle(x, targets, **terms),
        logits,
        floor=1.0 if vocab == 1 else 0.0,  # terms of size one cancel
    )


def test_counts_and_likelihoods(backend):
    logits, targets = made(7, 50, torch.bfloat16)
    found = kernels.cross_entropy(logits, targets, z_loss=0.1, label_smoothing=0.2)
    expected = F.cross_entropy(logits.double(), targets, reduction="sum")
    torch.testing.assert_close(found.nll_sum, expected.detach(), rtol=1e-6, atol=0)
    assert found.num_tokens == 5
    assert not found.nll_sum.requires_grad


def test_weights_shapes_and_another_ignored_id(backend, agree):
    logits, targets = made(6, 20)
    weights = torch.rand(6).requires_grad_()
    agree(
        lambda x, w: kernels.cross_entropy(x, targets, weights=w).loss_sum,
        lambda x, w: oracle(x, targets, weights=w),
        logits,
        weights,
    )
    shaped = kernels.cross_entropy(logits.view(2, 3, 20), targets.view(2, 3).where(targets.view(2, 3) != -100, 7),
                                   ignore_index=7)  # fmt: skip
    expected = F.cross_entropy(logits, targets.where(targets != -100, 7), ignore_index=7, reduction="sum")
    torch.testing.assert_close(shaped.loss_sum, expected)


def test_nothing_to_learn(backend, agree):
    logits, _ = made(3, 9)
    none = torch.full((3,), -100)
    agree(lambda x: kernels.cross_entropy(x, none).loss_sum, lambda x: oracle(x, none), logits)
    empty = kernels.cross_entropy(logits[:0], none[:0])
    assert (empty.loss_sum.item(), empty.num_tokens.item()) == (0.0, 0)


def test_ignored_rows_may_hold_anything(backend):
    logits, targets = made(3, 40)
    with torch.no_grad():
        logits[1, :5] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38])
    kernels.cross_entropy(logits, targets).loss_sum.backward()
    assert torch.equal(logits.grad[1], torch.zeros(40))
    assert logits.grad.isfinite().all()


def test_huge_and_forbidden_logits(backend, agree):
    targets = torch.tensor([1, 0, 2])
    logits = torch.tensor([[1e4, -1e4, 0.0], [3e4, 3e4, -3e4], [-1e38, 2e38, 3e38]]).requires_grad_()
    agree(lambda x: kernels.cross_entropy(x, targets).loss_sum, lambda x: oracle(x, targets), logits)
    forbidden = torch.tensor([[0.5, -torch.inf, 1.0], [-torch.inf, 0.0, -torch.inf]]).requires_grad_()
    allowed = torch.tensor([0, 1])
    kernels.cross_entropy(forbidden, allowed).loss_sum.backward()
    expected = forbidden.detach().softmax(-1) - F.one_hot(allowed, 3)
    torch.testing.assert_close(forbidden.grad, expected)


def test_an_upstream_gradient_is_part_of_the_one_pass(backend):
    logits, targets = made(5, 60)
    (one,) = torch.autograd.grad(kernels.cross_entropy(logits, targets).loss_sum, logits)
    (half,) = torch.autograd.grad(0.5 * kernels.cross_entropy(logits, targets).loss_sum, logits)
    assert torch.equal(half, 0.5 * one)


def test_columns_and_slices_are_read_where_they_lie(backend, agree):
    logits, targets = made(6, 24)
    agree(
        lambda x: kernels.cross_entropy(x[::2, 3:20], targets[::2] % 17).loss_sum,
        lambda x: oracle(x[::2, 3:20], targets[::2] % 17),
        logits,
    )
    agree(
        lambda x: kernels.cross_entropy(x.T, targets[:4]).loss_sum,
        lambda x: oracle(x.T, targets[:4]),
        torch.randn(24, 4).requires_grad_(),
    )

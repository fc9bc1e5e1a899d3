"""Losses and scores straight from features, against all logits in float64."""

import weakref

import pytest
import torch
import torch.nn.functional as F

from lightning_lm import kernels
from lightning_lm.kernels.lm_head import head as heads
from lightning_lm.kernels.lm_head import logits as vocabulary
from lightning_lm.kernels.lm_head.head import Head
from lightning_lm.kernels.lm_head.linear_cross_entropy import _linear_cross_entropy_forward
from lightning_lm.kernels.lm_head.linear_logprob import _linear_logprob_backward, _linear_logprob_forward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BUDGET = 6000
"""Bytes: a few rows at a time."""


def problem(rows=7, size=16, vocab=50, dtype=torch.float32, bias=True):
    targets = torch.randint(0, vocab, (rows,))
    targets[1::3] = -100
    hidden = torch.randn(rows, size).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, size) / 4).to(dtype).requires_grad_()
    return targets, hidden, weight, torch.randn(vocab).to(dtype).requires_grad_()


def logits_of(hidden, weight, bias, softcap=None, temperature=1.0):
    logits = F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits / temperature


def loss_oracle(hidden, weight, bias, targets, *, softcap=None, z_loss=0.0, label_smoothing=0.0):
    logits = logits_of(hidden, weight, bias, softcap)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return (losses + z_loss * torch.where(targets == -100, 0, logits.logsumexp(-1)) ** 2).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [{}, {"softcap": 2.0, "z_loss": 1e-2, "label_smoothing": 0.2}], ids=["plain", "all"])
def test_linear_cross_entropy(backend, agree, terms, dtype):
    targets, *inputs = problem(dtype=dtype)
    agree(
        lambda h, w, b: kernels.linear_cross_entropy(h, w, targets, bias=b, budget_bytes=BUDGET, **terms).loss_sum,
        lambda h, w, b: loss_oracle(h, w, b, targets, **terms),
        *inputs,
        bound={torch.float32: 4e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}[dtype],
    )


@pytest.fixture
def two_rows_at_a_time(monkeypatch):
    """Let torch make its temporary matrices of two rows of 50 logits, however many a piece has."""
    for module in (heads, vocabulary):
        monkeypatch.setattr(module, "WORK_BYTES", 2 * 24 * 50)


@pytest.mark.usefixtures("two_rows_at_a_time")
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_piece(backend, agree, dtype):
    targets, hidden, weight, bias = problem(11, dtype=dtype)
    options = {"softcap": 2.0, "z_loss": 1e-2, "label_smoothing": 0.2}
    agree(
        lambda h, w, b: kernels.linear_cross_entropy(h, w, targets, bias=b, **options).loss_sum,
        lambda h, w, b: loss_oracle(h, w, b, targets, **options),
        *(hidden, weight, bias),
        bound={torch.float32: 4e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}[dtype],
    )
    found = kernels.linear_logprob(hidden, weight, targets, bias=bias)
    log_p = logits_of(hidden.float(), weight.float(), bias.float()).log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1).where(targets != -100, 0.0)
    torch.testing.assert_close(found.entropies, entropies.detach(), rtol=4 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize(("rows", "size", "vocab"), [(1, 1, 1), (2, 33, 33), (2, 5, 1000), (2, 3, 4100)])
def test_odd_sizes(backend, agree, rows, size, vocab):
    targets, hidden, weight, _ = problem(rows, size, vocab)
    agree(
        lambda h, w: kernels.linear_cross_entropy(h, w, targets).loss_sum,
        lambda h, w: loss_oracle(h, w, None, targets),
        hidden,
        weight,
        floor=1.0,
    )
    agree(
        lambda h, w: kernels.linear_nll(h, w, targets),
        lambda h, w: nll_oracle(h, w, targets),
        hidden.detach(),
        weight.detach(),
        floor=1.0,
    )


def nll_oracle(hidden, weight, targets, bias=None, softcap=None):
    return F.cross_entropy(logits_of(hidden, weight, bias, softcap), targets, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "temperature": 0.7}], ids=["plain", "all"])
def test_log_probabilities_and_entropies(backend, agree, options, dtype):
    targets, *inputs = problem(dtype=dtype)

    def oracle(hidden, weight, bias):
        log_p = logits_of(hidden, weight, bias, **options).log_softmax(-1)
        learned = targets != -100
        chosen = log_p.gather(1, targets.where(learned, 0)[:, None]).squeeze(1)
        return chosen.where(learned, 0.0), (-(log_p.exp() * log_p).sum(-1)).where(learned, 0.0)

    agree(
        lambda h, w, b: tuple(
            kernels.linear_logprob(h, w, targets, bias=b, entropy_gradient=True, budget_bytes=BUDGET, **options)
        ),
        oracle,
        *inputs,
        bound={torch.float32: 4e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}[dtype],
    )


def test_measures_and_weights_by_confidence(backend):
    targets, hidden, weight, bias = problem()
    logits = logits_of(hidden.double(), weight.double(), bias.double())
    learned = targets != -100
    log_p = logits.log_softmax(-1)[learned]
    found = kernels.measured_cross_entropy(hidden, weight, targets, bias=bias, by_confidence=True)
    nll = -log_p.gather(1, targets[learned][:, None]).squeeze(1)
    torch.testing.assert_close(found.loss.nll_sum, nll.sum().detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.entropy_sum, -(log_p.exp() * log_p).sum().detach(), rtol=1e-5, atol=0)
    assert found.num_correct == (log_p.argmax(-1) == targets[learned]).sum()
    expected = (nll * nll.detach().neg().exp()).sum()
    torch.testing.assert_close(found.loss.loss_sum.double(), expected, rtol=1e-5, atol=0)
    (ours,) = torch.autograd.grad(found.loss.loss_sum, weight)
    (theirs,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_likeliest_of_equals_is_the_first(backend):
    hidden, weight = torch.zeros(2, 4), torch.randn(6, 4)
    assert kernels.measured_cross_entropy(hidden, weight, torch.tensor([0, 3])).num_correct == 1


@pytest.mark.parametrize("chunks", [1, 16])
def test_the_gradient_of_the_weight_does_not_lose_bits_with_chunks(backend, chunks):
    rows, size, vocab = 64, 32, 64
    targets = torch.randint(0, vocab, (rows,))
    hidden, weight = torch.randn(rows, size).bfloat16(), (torch.randn(vocab, size) / 6).bfloat16().requires_grad_()
    # The gradient of the logits as the products see it, in bfloat16; the rest in float64.
    logits = (hidden @ weight.T).float()
    grad = (logits.softmax(-1) - F.one_hot(targets, vocab)).bfloat16().double()
    expected = 0.5 * grad.T @ hidden.double()
    per_row = 2 if backend == "triton" else 26
    budget = rows // chunks * vocab * per_row
    loss = kernels.linear_cross_entropy(hidden, weight, targets, budget_bytes=budget).loss_sum
    (found,) = torch.autograd.grad(0.5 * loss, weight)
    assert (found.double() - expected).norm() <= 2.5e-3 * expected.norm()


def test_frozen_heads_and_no_gradients(backend):
    targets, hidden, weight, bias = problem()
    loss = kernels.linear_cross_entropy(hidden, weight.detach(), targets, bias=bias.detach()).loss_sum
    (found,) = torch.autograd.grad(loss, hidden)
    (whole,) = torch.autograd.grad(kernels.linear_cross_entropy(hidden, weight, targets, bias=bias).loss_sum, hidden)
    assert torch.equal(found, whole)
    with torch.no_grad():
        assert not kernels.linear_cross_entropy(hidden, weight, targets).loss_sum.requires_grad


def test_empty_and_fully_masked(backend):
    targets, hidden, weight, _ = problem()
    for labels, rows in ((torch.full_like(targets, -100), hidden), (targets[:0], hidden[:0])):
        found = kernels.linear_cross_entropy(rows, weight, labels)
        assert (found.loss_sum.item(), found.num_tokens.item()) == (0.0, 0)
        assert torch.autograd.grad(found.loss_sum, weight)[0].count_nonzero() == 0
        assert kernels.linear_nll(rows, weight, labels).sum() == 0


def test_autocast_computes_products_in_its_type_and_returns_gradients_in_that_of_the_parameters(backend):
    targets, hidden, weight, _ = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kernels.linear_cross_entropy(hidden, weight, targets).loss_sum
    low = kernels.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets).loss_sum
    torch.testing.assert_close(loss, low, rtol=1e-6, atol=0)
    assert {grad.dtype for grad in torch.autograd.grad(loss, (hidden, weight))} == {torch.float32}


class Meter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of the living tensors, other than the inputs, that have a column for each token id."""

    def __init__(self, vocab, inputs):
        super().__init__()
        self.vocab, self.now, self.peak = vocab, 0, 0
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.ndim == 2 and value.size(1) == self.vocab:
                self.add(value.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [40_000, 200_000])
def test_logits_never_take_more_than_their_budget(backend, budget, dtype, monkeypatch):
    """Neither do all tensors together that have a column for each token id, whatever they hold."""
    if backend == "triton":  # the interpreter keeps what it was given until garbage is collected; memory is our matter
        monkeypatch.setattr("lightning_lm.kernels.lm_head.logits.launch", lambda *_, **__: None)
    rows, vocab = 400, 257
    targets, *inputs = problem(rows, 8, vocab, dtype)
    hidden, weight, bias = (tensor.detach() for tensor in inputs)
    asked = {"measured": True, "dtype": dtype, "budget": budget, "needs": [True] * 3}
    shard = {"num_ids": vocab, "shard_size": vocab, "group_name": ""}
    head = Head(hidden, weight, bias, targets, softcap=2.0, temperature=0.7, **asked, **shard)
    with Meter(vocab, (weight, hidden, bias)) as meter:
        _linear_cross_entropy_forward(*head, 1e-2, 0.1, True)
    assert budget / 4 < meter.peak <= budget

    with Meter(vocab, (weight, hidden, bias)) as meter:
        found = _linear_logprob_forward(*head)
        _linear_logprob_backward(*found[:2], *head[:4], *found[1:], *head[4:])
    assert budget / 4 < meter.peak <= budget


def test_large_vocabularies_multiply_at_least_256_rows_at_once():
    """Each chunk reads all of the weight and of its gradient; what is made of its logits still fits into caches."""
    rows, vocab = 512, 60_000
    targets, *inputs = problem(rows, 2, vocab, bias=False)
    hidden, weight, _ = (tensor.detach() for tensor in inputs)
    head = heads.open_head(hidden, weight.requires_grad_(), None, targets, softcap=None)
    assert [len(range(rows)[chunk]) for chunk, _ in head.chunks("linear_cross_entropy")] == [256, 256]
    with Meter(vocab, (weight, hidden)) as meter:
        _linear_cross_entropy_forward(*head._replace(weight=weight.detach()), 0.0, 0.0, False)
    assert meter.peak <= 4 * 256 * vocab + 16 * 2**20

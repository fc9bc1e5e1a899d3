"""Entropies, correct predictions and confidence from chunks of logits, against all of them in float64."""

import pytest
import torch

from lightning_lm.functional.cross_entropy import token_cross_entropy
from lightning_lm.kernels import linear_cross_entropy, measured_cross_entropy
from lightning_lm.kernels.lm_head import head
from lightning_lm.types import IGNORE_INDEX

OPTIONS = [{}, {"z_loss": 0.01}, {"label_smoothing": 0.1}, {"softcap": 3.0, "z_loss": 0.01, "label_smoothing": 0.2}]


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 16, generator=generator), torch.randn(23, 16, generator=generator)
    bias, targets = torch.randn(23, generator=generator), torch.randint(23, (37,), generator=generator)
    targets[::5] = IGNORE_INDEX
    return hidden, weight, bias, targets


@pytest.fixture(params=[1, 7, 10**6], ids=["one row", "ragged chunks", "one chunk"])
def chunk_rows(request, monkeypatch):
    for name, value in {"_BUDGETS": {"default": request.param * 23 * 4}, "_MIN_ROWS": 0, "WORK_BYTES": 0}.items():
        monkeypatch.setattr(head, name, value)


def capped(hidden, weight, bias, softcap):
    logits = hidden.double() @ weight.double().T + bias.double()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("by_confidence", [False, True])
def test_sums_and_gradients(problem, options, by_confidence):
    hidden, weight, bias, targets = problem
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    found = measured_cross_entropy(
        leaves[0], leaves[1], targets, bias=leaves[2], by_confidence=by_confidence, **options
    )
    found.loss.loss_sum.backward()

    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = capped(*exact, options.get("softcap"))[targets != IGNORE_INDEX]
    chosen = targets[targets != IGNORE_INDEX]
    log_probs = logits.log_softmax(-1)
    nll = -log_probs.gather(1, chosen[:, None]).squeeze(1)
    smoothing = options.get("label_smoothing", 0.0)
    loss = (1 - smoothing) * nll - smoothing * log_probs.mean(-1)
    loss = loss + options.get("z_loss", 0.0) * logits.logsumexp(-1).square()
    if by_confidence:
        loss = loss * (-nll).exp().detach()
    loss.sum().backward()

    assert found.loss.loss_sum.item() == pytest.approx(loss.sum().item(), rel=2e-6)
    assert found.loss.nll_sum.item() == pytest.approx(nll.sum().item(), rel=2e-6)
    assert found.loss.num_tokens.item() == len(chosen)
    assert found.entropy_sum.item() == pytest.approx(-(log_probs.exp() * log_probs).sum().item(), rel=2e-6)
    assert found.num_correct.item() == (logits.argmax(-1) == chosen).sum().item()
    for mine, theirs in zip(leaves, exact, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad.float(), rtol=2e-5, atol=2e-5)


def test_ignored_rows_may_hold_anything(problem):
    hidden, weight, bias, targets = problem
    hidden[0] = torch.inf
    hidden[5] = torch.nan
    hidden.requires_grad_()
    found = measured_cross_entropy(hidden, weight, targets, bias=bias, by_confidence=True)
    found.loss.loss_sum.backward()
    assert torch.isfinite(torch.stack([found.loss.loss_sum, found.entropy_sum, found.num_correct])).all()
    assert torch.isfinite(hidden.grad[targets != IGNORE_INDEX]).all()


def test_huge_logits_and_no_row_at_all():
    hidden, weight = torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.0], [-1.0]])
    found = measured_cross_entropy(hidden, weight, torch.tensor([0, 0]))
    assert [found.loss.nll_sum.item(), found.entropy_sum.item(), found.num_correct.item()] == [2e4, 0, 1]
    none = measured_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    assert [none.loss.loss_sum.item(), none.entropy_sum.item(), none.num_correct.item()] == [0, 0, 0]


def test_bfloat16_features_are_measured_in_float32(problem):
    hidden, weight, _, targets = problem
    low = measured_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    high = measured_cross_entropy(hidden, weight, targets)
    assert low.entropy_sum.item() == pytest.approx(high.entropy_sum.item(), rel=2e-2)
    assert low.loss.loss_sum.dtype == torch.float32


def test_without_measuring_the_loss_is_the_same(problem):
    hidden, weight, bias, targets = problem
    plain = linear_cross_entropy(hidden, weight, targets, bias=bias)
    measured = measured_cross_entropy(hidden, weight, targets, bias=bias).loss
    assert [value.item() for value in plain] == [value.item() for value in measured]
    from_logits = token_cross_entropy(hidden @ weight.T + bias, targets, by_confidence=True)
    chunked = measured_cross_entropy(hidden, weight, targets, bias=bias, by_confidence=True).loss
    assert from_logits.loss_sum.item() == pytest.approx(chunked.loss_sum.item(), rel=2e-6)

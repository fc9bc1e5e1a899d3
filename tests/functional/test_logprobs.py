"""Log-probabilities and entropies against float64."""

import math

import pytest
import torch

from lightning_lm.functional.logprobs import entropy, masked_mean, masked_normalize, sequence_logprobs, token_logprobs
from lightning_lm.kernels import linear_logprob


def exact_logprobs(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    scaled = logits.double() / temperature
    return torch.log(torch.softmax(scaled, -1)).gather(-1, ids[..., None])[..., 0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_match_float64(temperature: float) -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 5, 37) * 4, torch.randint(37, (3, 5))
    expected = exact_logprobs(logits, ids, temperature)
    torch.testing.assert_close(
        token_logprobs(logits, ids, temperature=temperature).double(), expected, rtol=2e-7, atol=1e-6
    )


def test_bfloat16_logits_of_a_large_vocabulary_lose_nothing() -> None:
    torch.manual_seed(0)
    logits, ids = (torch.randn(4, 152_064) * 3).bfloat16(), torch.randint(152_064, (4,))
    ours = token_logprobs(logits, ids)
    in_bfloat16 = torch.log_softmax(logits, -1).gather(-1, ids[:, None])[:, 0].double()
    expected = exact_logprobs(logits, ids)
    assert (ours.double() - expected).abs().max() < 1e-5
    assert (in_bfloat16 - expected).abs().max() > 1e-3  # what the float32 sum is for


def test_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    scores = token_logprobs(logits, torch.tensor([1]))
    assert scores.item() == -2e4
    (scores.sum() + entropy(logits).sum()).backward()
    assert torch.isfinite(logits.grad).all()


def test_entropy_of_uniform_certain_and_masked_distributions() -> None:
    logits = torch.zeros(3, 8)
    logits[1, 0] = 1e4
    logits[2, 4:] = float("-inf")
    logits.requires_grad_()
    values = entropy(logits)
    torch.testing.assert_close(values.tolist(), [math.log(8), 0.0, math.log(4)], rtol=0, atol=1e-6)
    values.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_masked_mean_never_reads_what_is_masked() -> None:
    values = torch.tensor([[1.0, float("nan")], [float("inf"), 5.0]])
    mask = torch.tensor([[True, False], [False, True]])
    assert masked_mean(values, mask).item() == 3.0
    assert masked_mean(values, mask, dim=1).tolist() == [1.0, 5.0]
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0.0
    assert masked_normalize(values, mask, 4.0).item() == 1.5
    assert masked_normalize(values, mask, 4.0, dim=0).tolist() == [0.25, 1.25]


def test_sequence_logprobs_sum_the_unmasked() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, float("-inf")]])
    assert sequence_logprobs(logprobs, torch.tensor([[True, True, False]])).tolist() == [-3.0]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scores_from_features_equal_those_of_full_logits(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 6, dtype=torch.float64)
    weight, ids = torch.randn(11, 6, dtype=torch.float64), torch.randint(11, (2, 9))
    ours_hidden, ours_weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    scores = linear_logprob(ours_hidden, ours_weight, ids, temperature=0.7, softcap=softcap, budget_bytes=4 * 11 * 28)
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = exact_logprobs(logits, ids, 0.7)
    probabilities = torch.softmax(logits / 0.7, -1)
    torch.testing.assert_close(scores.logprobs.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        scores.entropies.double(), -(probabilities * probabilities.log()).sum(-1), rtol=0, atol=1e-5
    )
    upstream = torch.randn(2, 9)
    (scores.logprobs * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours_hidden.grad.double(), hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours_weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)
    assert not scores.entropies.requires_grad

"""Scores of learned tokens against a float64 log-softmax of all logits."""

import pytest
import torch
from torch import nn

from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.modules.token_losses import token_scores
from lightning_lm.types import IGNORE_INDEX

VOCAB, TEMPERATURE = 31, 0.7


def wanted(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model.double()(batch["input_ids"][:, :-1]) / TEMPERATURE
    logp = logits - logits.exp().sum(-1, keepdim=True).log()
    targets = batch["labels"][:, 1:]
    learned = targets != IGNORE_INDEX
    chosen = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return chosen * learned, -(logp.exp() * logp).sum(-1) * learned


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = Layer(mixer=Attention(num_heads=2))
    return TransformerConfig(vocab_size=VOCAB, d_model=16, num_layers=2, layers=layers, logit_softcap=3.0).build()


class Foreign(nn.Module):
    """A model of which only logits are known, as an attribute of what it returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor) -> object:
        class Output:
            logits = self.inner(input_ids)

        return Output()


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_scores_and_gradients(model, rows, foreign, entropy_gradient):
    batch = rows(12, empty=True)
    scores = token_scores(
        Foreign(model) if foreign else model, batch, temperature=TEMPERATURE, entropy_gradient=entropy_gradient
    )
    torch.manual_seed(1)
    up, side = torch.randn(2, *scores.logprobs.shape, dtype=torch.float64).unbind()
    loss = (scores.logprobs * up).sum() + (scores.entropies * side).sum()
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logprobs, entropies = wanted(model, batch)
    torch.testing.assert_close(scores.logprobs.double(), logprobs, rtol=0, atol=2e-6)
    torch.testing.assert_close(scores.entropies.double(), entropies, rtol=0, atol=2e-6)
    ((logprobs * up).sum() + (entropies * side).sum() * entropy_gradient).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("foreign", [False, True])
def test_nothing_learned_gives_zero_gradients_for_every_parameter(model, rows, foreign):
    batch = rows(3)
    batch["labels"].fill_(IGNORE_INDEX)
    scores = token_scores(Foreign(model) if foreign else model, batch)
    assert scores.logprobs.abs().sum() == 0
    scores.logprobs.sum().backward()
    assert all(torch.count_nonzero(parameter.grad) == 0 for parameter in model.parameters())


def test_a_bias_of_the_head_counts(model, rows):
    batch = rows(4)
    model.head = nn.Linear(16, VOCAB)
    scores = token_scores(model, batch, temperature=TEMPERATURE)
    torch.testing.assert_close(scores.logprobs.double(), wanted(model, batch)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_scores_as_its_reference_does(model: nn.Module, dtype: torch.dtype) -> None:
    """With and without a gradient, to the bit: else DPO does not begin at ln 2, nor a fresh ratio at 1."""
    ids = torch.randint(VOCAB, (4, 40), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids.clone()}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        policy = token_scores(model, batch).logprobs.detach()
        with torch.no_grad():
            reference = token_scores(model.eval(), batch).logprobs
    assert torch.equal(policy, reference)

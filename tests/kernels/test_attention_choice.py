"""One function for attention: what it gives does not depend on what it chooses, and it says what it chose."""

import pytest
import torch

from lightning_lm import kernels
from lightning_lm.functional import Documents, causal_attention
from lightning_lm.kernels.attention import attention

IDS = torch.tensor([[0] * 30 + [1] * 60, [0] * 1 + [1] * 89])


def made(queries=90, size=16):
    shapes = [(2, 2, queries, size), (2, 1, 90, size), (2, 1, 90, size)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"window": 500, "scale": 0.3}, {"softcap": 3.0}], ids=str)
def test_packed_rows_and_windows_agree_with_what_models_call(backend, agree, packed, options):
    documents = Documents(ids=IDS, runs=()) if packed else None
    agree(
        lambda *inputs: attention(*inputs, mask=documents, **options),
        lambda *inputs: causal_attention(*inputs, mask=documents, **options),
        *made(),
    )


def test_no_mask_of_pairs_is_built_for_packed_rows(triton, monkeypatch):
    monkeypatch.setattr(Documents, "mask", lambda *_: pytest.fail("a mask of all pairs"))
    attention(*made(), mask=Documents(ids=IDS, runs=()), window=7)


def test_a_cache_goes_to_torch_and_the_report_says_why():
    inputs = made(queries=3)
    torch.testing.assert_close(attention(*inputs), causal_attention(*inputs), atol=0, rtol=0)
    (choice,) = (choice for choice in kernels.choices("cpu") if choice.operation == "attention")
    assert (choice.backend, "cpu" in choice.reason) == ("torch", True)

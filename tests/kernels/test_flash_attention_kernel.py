"""FlashAttention-2 in Triton's interpreter against the softmax over all visible pairs in float64."""

import math

import pytest
import torch

from lightning_lm import kernels
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional import first_visible
from lightning_lm.kernels.flash_attention.operation import flash_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def oracle(query, key, value, *, first=None, softcap=None, scale=None):
    group, offset = query.size(1) // key.size(1), key.size(2) - query.size(2)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * (query.size(-1) ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    columns = torch.arange(key.size(2))
    seen = columns <= torch.arange(query.size(2))[:, None] + offset
    if first is not None:
        seen = (seen & (columns >= first[..., None]))[:, None]
    return torch.softmax(scores.masked_fill(~seen, -math.inf), -1).nan_to_num(0) @ value


def made(*, batch=1, heads=2, kv_heads=1, queries=150, keys=None, size=16, dtype=torch.float32):
    """As the projections of a model leave them: [batch, seq, heads, size], transposed."""
    keys = queries if keys is None else keys
    shapes = [(batch, queries, heads, size), (batch, keys, kv_heads, size), (batch, keys, kv_heads, size)]
    return [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def starts(*lengths):
    """Where the document of each token of a row begins."""
    return torch.tensor([sum(lengths[:index]) for index, length in enumerate(lengths) for _ in range(length)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 64, 128])
def test_causal_with_grouped_heads(backend, agree, dtype, size):
    agree(flash_attention, oracle, *made(size=size, dtype=dtype))


@pytest.mark.parametrize("size", [1, 33, 80])
def test_heads_between_powers_of_two_are_padded(backend, agree, size):
    agree(flash_attention, oracle, *made(size=size, queries=40))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 100), (33, 33), (70, 200), (129, 129)])
def test_queries_are_the_last_of_the_keys(backend, agree, queries, keys):
    # With one key the gradients of scores are zero: two terms of size one that cancel.
    agree(flash_attention, oracle, *made(queries=queries, keys=keys), floor=1.0)


@pytest.mark.parametrize("window", [None, 1, 40, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_and_windows(backend, agree, window, dtype):
    documents = torch.stack((starts(3, 1, 90, 64, 42), starts(200)))
    first = first_visible(documents, window)
    agree(
        lambda *inputs: flash_attention(*inputs, first=first),
        lambda *inputs: oracle(*inputs, first=first),
        *made(batch=2, queries=200, heads=1, dtype=dtype),
        floor=1.0,
    )


def test_one_row_of_bounds_for_the_whole_batch(backend, agree):
    first = first_visible(torch.zeros(1, 100, dtype=torch.int32), 30)
    agree(
        lambda *inputs: flash_attention(*inputs, first=first),
        lambda *inputs: oracle(*inputs, first=first.expand(2, -1)),
        *made(batch=2, queries=100),
    )


def test_soft_cap_and_scale(backend, agree):
    options = {"softcap": 2.0, "scale": 0.7}
    agree(
        lambda *inputs: flash_attention(*inputs, **options),
        lambda *inputs: oracle(*inputs, **options),
        *made(queries=90),
    )


def test_queries_that_see_nothing_give_zeros(backend, agree):
    first = torch.cat((torch.zeros(50, dtype=torch.int64), torch.full((50,), 100)))[None]
    inputs = made(queries=100)
    agree(
        lambda *inputs: flash_attention(*inputs, first=first),
        lambda *inputs: oracle(*inputs, first=first),
        *inputs,
    )
    assert flash_attention(*inputs, first=first)[:, :, 50:].eq(0).all()


def test_scores_of_ten_thousand(backend):
    query, key, value = made(queries=70)
    query = (query.detach() * 1e4).requires_grad_()
    result = flash_attention(query, key, value)
    exact = oracle(query.double(), key.double(), value.double())
    torch.testing.assert_close(result.double(), exact, atol=2e-3, rtol=0)  # a few times 1e4 * 2^-24 of the scores
    for ours, theirs in zip(
        torch.autograd.grad(result.sum(), (query, value)), torch.autograd.grad(exact.sum(), (query, value)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_an_empty_batch(backend, agree):
    agree(flash_attention, oracle, *made(batch=0))


def test_kernel_and_reference_round_alike(triton):
    inputs = made(queries=150, dtype=torch.bfloat16)
    ours = flash_attention(*inputs)
    with kernels.force_backend("torch"):
        reference = flash_attention(*inputs)
    assert ours.stride() == reference.stride()
    exact = oracle(*(tensor.double() for tensor in inputs))
    error, theirs = (ours - exact).abs().max(), (reference - exact).abs().max()
    assert error < 1.5 * theirs


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"size": 256}, "head_dim=256 is above 128"),
        ({"queries": 5, "keys": 4}, "1 heads of 4 keys"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_what_the_kernels_cannot_take_is_said(triton, inputs, reason):
    with pytest.raises(ConfigurationError, match=reason):
        flash_attention(*made(**{"queries": 5, **inputs}))

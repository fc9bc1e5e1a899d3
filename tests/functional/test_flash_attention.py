"""The tiled attention against the softmax over all visible pairs in float64."""

import math

import pytest
import torch

from lightning_lm.functional import Documents, causal_attention, first_visible, flash_attention

EXACT = 1e-12  # float64: only the order of sums differs
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # bfloat16 holds 8 bits of mantissa


def naive(query, key, value, *, first=None, softcap=None, scale=None):
    """The formula over all pairs; a query that sees nothing gives zeros."""
    query, key, value = query.double(), key.double(), value.double()
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


def tensors(*, heads=4, kv_heads=2, queries=37, keys=None, dtype=torch.float64, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    keys = queries if keys is None else keys
    shapes = [(2, heads, queries, head_dim), (2, kv_heads, keys, head_dim), (2, kv_heads, keys, head_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def agree(got, expected, inputs, tolerance):
    weights = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=0)
    ours = torch.autograd.grad((got * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), exact.double(), atol=tolerance, rtol=0)


STARTS = torch.tensor([[0] * 5 + [5] * 1 + [6] * 21 + [27] * 10, [0] * 37])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 9, 50])
@pytest.mark.parametrize("packed", [False, True])
def test_agrees_with_the_formula_forward_and_backward(kv_heads, softcap, window, packed):
    inputs = tensors(kv_heads=kv_heads)
    first = first_visible(STARTS if packed else torch.zeros_like(STARTS), window)
    got = flash_attention(*inputs, first=first, softcap=softcap, scale=0.3, block=8)
    agree(got, naive(*inputs, first=first, softcap=softcap, scale=0.3), inputs, EXACT)


@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (5, 9), (16, 64), (1, 1)])
def test_queries_are_the_last_of_the_keys(queries, keys):
    inputs = tensors(queries=queries, keys=keys)
    agree(flash_attention(*inputs, block=4), naive(*inputs), inputs, EXACT)


@pytest.mark.parametrize("block", [1, 7, 37, 64])
def test_the_size_of_a_tile_does_not_matter(block):
    inputs = tensors()
    agree(flash_attention(*inputs, block=block), naive(*inputs), inputs, EXACT)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_lower_precision(dtype, softcap):
    inputs = tensors(dtype=dtype)
    got = flash_attention(*inputs, softcap=softcap, block=8)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), naive(*inputs, softcap=softcap), atol=BOUNDS[dtype], rtol=0)


def test_scores_of_ten_thousand():
    query, key, value = tensors(dtype=torch.float32)
    query = query.detach() * 1e4
    got = flash_attention(query, key, value, block=8)
    torch.testing.assert_close(got.double(), naive(query, key, value), atol=1e-3, rtol=0)  # 1e4 * 2^-24 of the scores


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient():
    inputs = tensors(queries=12)
    first = torch.zeros(2, 12, dtype=torch.int64)
    first[0, 3], first[1, 8:] = 4, 12
    got = flash_attention(*inputs, first=first, block=4)
    assert got[0, :, 3].eq(0).all()
    agree(got, naive(*inputs, first=first), inputs, EXACT)
    (gradient,) = torch.autograd.grad(flash_attention(*inputs, first=first, block=4).sum(), inputs[0])
    assert gradient[1, :, 8:].eq(0).all()


def test_what_models_call_gives_the_same_for_packed_rows_and_windows():
    inputs = tensors()
    ids = torch.tensor([[0] * 5 + [1] + [2] * 21 + [3] * 10, [4] * 37])
    documents = Documents.from_ids(ids)
    starts = torch.arange(37) - documents.positions()
    got = flash_attention(*inputs, first=first_visible(starts, 4), block=8)
    expected = causal_attention(*inputs, mask=documents, window=4)
    agree(got, expected, inputs, EXACT)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_the_first_keys_of_documents_are_their_mask(window):
    documents = Documents.from_ids(torch.tensor([[0] * 5 + [1] + [2] * 21 + [3] * 10, [4] * 37]))
    columns = torch.arange(37)
    seen = (columns >= documents.first_keys(window)[..., None]) & (columns <= columns[:, None])
    assert torch.equal(seen[:, None], documents.mask(window))

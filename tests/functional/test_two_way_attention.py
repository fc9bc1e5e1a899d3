"""Attention in both directions, whole prefixes, and biases by distance: equal to the masked formula."""

import math

import pytest
import torch

from lightning_lm.functional.attention import Documents, biased_attention, bidirectional_attention, causal_attention
from lightning_lm.models.position_bias import ALiBi, RelativeBias, relative_buckets

IDS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 3, [0] * 17])


def _inputs(seq: int = 17, heads: int = 4, kv_heads: int = 2, size: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((2, heads, seq, size), (2, kv_heads, seq, size), (2, kv_heads, seq, size))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def _formula(query, key, value, visible, bias=0.0, softcap=None):
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
    scores = query @ key.mT / math.sqrt(query.size(-1))
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores + bias).masked_fill(~visible[:, None], -math.inf).softmax(-1) @ value


def _distance(seq: int) -> torch.Tensor:
    return torch.arange(seq)[:, None] - torch.arange(seq)


def _equal(found, wanted, inputs) -> None:
    assert torch.allclose(found, wanted, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((wanted * weights).sum(), inputs)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (1, None), (100, 2.0), (4, 2.0)])
def test_both_directions(window: int | None, softcap: float | None, folded: bool) -> None:
    inputs = _inputs()
    documents = Documents.from_ids(IDS) if folded else Documents(ids=IDS, runs=())
    visible = IDS[:, :, None] == IDS[:, None, :]
    if window is not None:
        visible = visible & (_distance(17).abs() < window)
    found = bidirectional_attention(*inputs, mask=documents, window=window, softcap=softcap)
    _equal(found, _formula(*inputs, visible, softcap=softcap), inputs)


@pytest.mark.parametrize("window", [None, 40])
def test_a_long_row_in_blocks(window: int | None) -> None:
    inputs = _inputs(seq=300, size=4)
    visible = torch.ones(2, 300, 300, dtype=torch.bool)
    if window is not None:
        visible = visible & (_distance(300).abs() < window)
    _equal(bidirectional_attention(*inputs, window=window), _formula(*inputs, visible), inputs)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_prefixes_see_themselves_whole(window: int | None, folded: bool) -> None:
    inputs = _inputs()
    lengths = torch.where(IDS == 0, 4, torch.where(IDS == 1, 9, 0))
    documents = Documents.from_ids(IDS, lengths) if folded else Documents(ids=IDS, runs=(), prefix_lengths=lengths)
    begins = torch.tensor([[0] * 5 + [5] * 9 + [14] * 3, [0] * 17])
    place = torch.arange(17) - begins
    distance = _distance(17)
    visible = (IDS[:, :, None] == IDS[:, None, :]) & ((distance >= 0) | (place < lengths)[:, None, :])
    if window is not None:
        visible = visible & (distance.abs() < window)
    _equal(causal_attention(*inputs, mask=documents, window=window), _formula(*inputs, visible), inputs)


def test_rows_without_prefixes_are_causal() -> None:
    assert Documents.from_ids(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)) is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("folded", [True, False])
def test_biases_by_distance(causal: bool, folded: bool) -> None:
    inputs = _inputs()
    table = RelativeBias(num_heads=4, num_buckets=8, max_distance=9, bidirectional=not causal).build(16, 17).double()
    torch.nn.init.normal_(table.weight)
    documents = Documents.from_ids(IDS) if folded else Documents(ids=IDS, runs=())
    visible = IDS[:, :, None] == IDS[:, None, :]
    if causal:
        visible = visible & (_distance(17) >= 0)
    found = biased_attention(*inputs, table, causal=causal, mask=documents)
    _equal(found, _formula(*inputs, visible, bias=table(_distance(17))), [*inputs, table.weight])


def test_a_new_token_over_cached_keys_has_the_biases_of_the_whole_row() -> None:
    query, key, value = _inputs(kv_heads=4)
    bias = ALiBi(num_heads=4).build(16, 17)
    whole = biased_attention(query, key, value, bias)
    assert torch.allclose(biased_attention(query[:, :, -1:], key, value, bias), whole[:, :, -1:], atol=1e-12)
    assert torch.allclose(biased_attention(query[:, :, -3:], key, value, bias), whole[:, :, -3:], atol=1e-12)


def test_the_buckets_are_t5s() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 300)
    for bidirectional in (True, False):
        theirs = T5Attention._relative_position_bucket(-distance, bidirectional, 32, 128)
        ours = relative_buckets(distance, num_buckets=32, max_distance=128, bidirectional=bidirectional)
        assert torch.equal(ours, theirs)


def test_the_slopes_are_those_of_the_paper() -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (1, 6, 8, 12):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        bias = ALiBi(num_heads=heads).build(16, 4)(torch.tensor([[0], [1]]))
        assert torch.allclose(-bias[:, 1, 0], theirs)

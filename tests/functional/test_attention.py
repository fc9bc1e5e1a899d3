"""Every way of attention against the formula, written out over all pairs in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_lm.functional.attention import Documents, causal_attention

EXACT = 1e-12  # float64: only the order of sums differs
SINGLE = 2e-6  # float32 against float64, features of order 1
HALF = 2e-2  # bfloat16 holds 8 bits of mantissa: 2^-8 of values up to 4


def naive(query, key, value, *, visible, softcap=None, scale=None):
    """Softmax over the visible pairs, one query at a time."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.size(1) // key.size(1)
    offset = key.size(2) - query.size(2)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    out = []
    for b in range(query.size(0)):
        for h in range(query.size(1)):
            for i in range(query.size(2)):
                seen = [j for j in range(key.size(2)) if visible(b, i + offset, j)]
                scores = (key[b, h // group, seen] * query[b, h, i]).sum(-1) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.exp(scores - scores.max())
                out.append((weights[:, None] * value[b, h // group, seen]).sum(0) / weights.sum())
    return torch.stack(out).view(*query.shape[:3], -1)


def tensors(*, batch=2, heads=2, kv_heads=2, queries=12, keys=None, head_dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    keys = queries if keys is None else keys
    shapes = [(batch, heads, queries, head_dim), (batch, kv_heads, keys, head_dim), (batch, kv_heads, keys, head_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def causal(_b, i, j):
    return j <= i


def within(window):
    return lambda _b, i, j: 0 <= i - j < window


def gradients(out, inputs):
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    return torch.autograd.grad((out * weights).sum(), inputs)


def agree(got, oracle, inputs):
    """Compare values and gradients."""
    torch.testing.assert_close(got, oracle, atol=EXACT, rtol=0)
    for ours, theirs in zip(gradients(got, inputs), gradients(oracle, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3, 12, 50])
def test_agrees_with_the_formula_forward_and_backward(kv_heads, softcap, window):
    inputs = [x.requires_grad_() for x in tensors(heads=4, kv_heads=kv_heads)]
    visible = causal if window is None else within(window)
    got = causal_attention(*inputs, window=window, softcap=softcap, scale=0.3)
    agree(got, naive(*inputs, visible=visible, softcap=softcap, scale=0.3), inputs)


@pytest.mark.parametrize("window", [2, 127, 128, 129, 200])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_a_window_over_several_blocks(window, kv_heads):
    inputs = [x.requires_grad_() for x in tensors(batch=1, kv_heads=kv_heads, queries=300, head_dim=4)]
    got = causal_attention(*inputs, window=window)
    agree(got, naive(*inputs, visible=within(window)), inputs)


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_queries_are_the_last_of_the_keys(queries, window, softcap):
    inputs = tensors(heads=4, kv_heads=2, queries=queries, keys=9)
    visible = causal if window is None else within(window)
    got = causal_attention(*inputs, window=window, softcap=softcap)
    torch.testing.assert_close(got, naive(*inputs, visible=visible, softcap=softcap), atol=EXACT, rtol=0)


ROWS = {
    "uneven": [[0] * 3 + [1] * 1 + [2] * 8, [0] * 7 + [1] * 5],
    "one row is whole": [[0] * 12, [4] * 6 + [7] * 6],
    "single tokens": [list(range(12)), [0] * 2 + [1] * 10],
    "rows share an id at their border": [[0] * 6 + [1] * 6, [1] * 4 + [2] * 8],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("folded", [True, False])
def test_documents_do_not_see_each_other(rows, window, softcap, folded):
    ids = torch.tensor(rows)
    documents = Documents.from_ids(ids) if folded else Documents(ids=ids, runs=())  # the way of other devices
    inputs = [x.requires_grad_() for x in tensors(heads=4, kv_heads=2)]
    allowed = causal if window is None else within(window)
    got = causal_attention(*inputs, mask=documents, window=window, softcap=softcap)
    oracle = naive(*inputs, visible=lambda b, i, j: allowed(b, i, j) and rows[b][i] == rows[b][j], softcap=softcap)
    agree(got, oracle, inputs)


def test_nothing_at_all_leaks_between_documents():
    query, key, value = tensors(batch=1, queries=40, dtype=torch.float32)
    documents = Documents.from_ids(torch.tensor([[0] * 17 + [1] * 23]))
    before = causal_attention(query, key, value, mask=documents)
    for x in (query, key, value):
        x[:, :, :17] = 1e4
    after = causal_attention(query, key, value, mask=documents)
    assert torch.equal(before[:, :, 17:], after[:, :, 17:])
    assert not torch.equal(before[:, :, :17], after[:, :, :17])


def test_a_masked_kernel_off_the_cpu_is_given_whole_heads(monkeypatch):
    """No kernel for GPUs takes a mask and groups; torch would compute all scores of all pairs."""
    kernel, grouped = F.scaled_dot_product_attention, []

    def watched(*args, enable_gqa=False, **options):
        grouped.append(enable_gqa)
        return kernel(*args, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    inputs = [tensor.to("meta") for tensor in tensors(heads=4, kv_heads=2)]
    documents = Documents.from_ids(torch.zeros(2, 12, dtype=torch.int64, device="meta"))
    assert causal_attention(*inputs, mask=documents).shape == inputs[0].shape
    causal_attention(*inputs)
    assert grouped == [False, True]


def test_whole_rows_need_no_documents():
    assert Documents.from_ids(torch.tensor([[3] * 5, [3] * 5, [0] * 5])) is None


def test_neighbouring_documents_of_equal_length_form_a_batch():
    documents = Documents.from_ids(torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1]]))
    assert documents.runs == ((4, 2), (1, 4))


def test_positions_start_again_at_each_document():
    ids = torch.tensor([[5, 5, 5, 6, 6, 9], [0, 1, 1, 1, 1, 1]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    assert Documents.from_ids(ids).positions().tolist() == expected


def test_a_boolean_mask_decides_everything():
    inputs = tensors(queries=3, keys=5)
    seen = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 1]], dtype=torch.bool)
    got = causal_attention(*inputs, mask=seen[None, None], window=1)
    oracle = naive(*inputs, visible=lambda _b, i, j: bool(seen[i - 2, j]))
    torch.testing.assert_close(got, oracle, atol=EXACT, rtol=0)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scores_of_ten_thousand(window, softcap):
    query, key, value = tensors(queries=20, dtype=torch.float32)
    query = query * 1e4
    got = causal_attention(query, key, value, window=window, softcap=softcap)
    oracle = naive(query, key, value, visible=causal if window is None else within(window), softcap=softcap)
    torch.testing.assert_close(got.double(), oracle, atol=1e-3, rtol=0)  # 1e4 * 2^-24 of the scores


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SINGLE), (torch.bfloat16, HALF)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_lower_precision(dtype, tolerance, softcap):
    inputs = tensors(queries=140, dtype=dtype)
    got = causal_attention(*inputs, window=9, softcap=softcap)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), naive(*inputs, visible=within(9), softcap=softcap), atol=tolerance, rtol=0)


def test_one_token_returns_its_value():
    query, key, value = tensors(queries=1)
    torch.testing.assert_close(causal_attention(query, key, value), value)


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_dropout_keeps_the_mean(softcap):
    torch.manual_seed(0)
    query, key, value = tensors(batch=1, heads=1, kv_heads=1, queries=3)
    many = [x.expand(4000, -1, -1, -1) for x in (query, key, value)]
    dropped = causal_attention(*many, dropout=0.3, softcap=softcap)
    expected = causal_attention(query, key, value, softcap=softcap)
    deviation = dropped.std(0) / math.sqrt(4000)
    assert ((dropped.mean(0) - expected[0]).abs() < 5 * deviation).all()
    assert deviation.min() > 0


def test_training_in_bfloat16_on_a_cpu_keeps_its_type_and_gradients() -> None:
    """The CPU works in float32 inside, whatever autocast says; types outside stay as they were."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 9, 8).bfloat16().requires_grad_() for _ in range(3))
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = causal_attention(query, key, value)
    expected = causal_attention(*exact)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=HALF)
    upstream = torch.randn(2, 4, 9, 8)
    mixed.backward(upstream.bfloat16())
    expected.backward(upstream.bfloat16().double())
    for ours, theirs in zip((query, key, value), exact, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=HALF, atol=HALF)


@pytest.mark.parametrize("way", ["causal", "window", "documents", "mask", "softcap", "cached"])
def test_a_cpu_computes_the_same_bits_with_and_without_a_gradient(way: str) -> None:
    """A policy and its reference, or a rollout and its first update, must not differ by rounding."""
    query, key, value = tensors(queries=24, keys=40 if way == "cached" else None, dtype=torch.bfloat16)
    settings = {
        "causal": {},
        "window": {"window": 5},
        "documents": {"mask": Documents.from_ids(torch.arange(24)[None].expand(2, 24) // 7)},
        "mask": {"mask": torch.rand(2, 1, 24, 24) < torch.eye(24) + 0.5},
        "softcap": {"softcap": 2.0},
        "cached": {},
    }[way]
    with torch.autocast("cpu", torch.bfloat16):
        alone = causal_attention(query, key, value, **settings)
        trained = causal_attention(query.requires_grad_(), key, value, **settings)
    assert torch.equal(trained, alone)

"""What a cached model says is what the same model says without a cache."""

import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.sink_attention import sink_attention
from lightning_lm.models import (
    MLP,
    Attention,
    FanIn,
    GatedAttention,
    LatentAttention,
    Layer,
    LearnedPositions,
    Rope,
    SinkAttention,
    SinusoidalPositions,
    TransformerConfig,
)
from lightning_lm.models.context import Context

SAME = 1e-12  # float64, so that the order of sums does not show on any CPU
VOCAB = 40
LENGTH = 30

LAYERS = {
    "plain": (Attention(num_heads=4),),
    "grouped": (Attention(num_heads=4, num_kv_heads=2),),
    "window": (Attention(num_heads=4, window=5),),
    "window of one": (Attention(num_heads=4, window=1),),
    "local and global": (Attention(num_heads=4, window=4, rope=Rope(base=100.0)), Attention(num_heads=4)),
    "soft cap and norms": (Attention(num_heads=4, num_kv_heads=1, softcap=3.0, qk_norm="head", window=6),),
    "no positions": (Attention(num_heads=4, rope=None),),
    "sinks and gate": (SinkAttention(num_heads=4, num_kv_heads=2, window=6), GatedAttention(num_heads=4)),
    "latent": (LatentAttention(num_heads=4, kv_rank=6, q_rank=5, nope_dim=4, rope_dim=2, v_dim=3),),
    "latent, expanded": (LatentAttention(num_heads=2, kv_rank=64, nope_dim=2, rope_dim=2, v_dim=2),),
}
layers = pytest.mark.parametrize("mixers", LAYERS.values(), ids=LAYERS)
CHUNKS = {"at once": [30], "token by token": [1] * 30, "prompt": [17] + [1] * 13, "pieces": [2, 11, 1, 9, 1, 1, 5]}
chunks = pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)


def small(mixers, **changes):
    torch.manual_seed(0)
    config = TransformerConfig(
        d_model=16,
        num_layers=3,
        layers=tuple(Layer(mixer=mixer, ffn=MLP(hidden_size=16)) for mixer in mixers),
        context_length=LENGTH,
        init=FanIn(),
        **changes,
    )
    return config.build(VOCAB).eval().double()


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def cached(model, ids, sizes, starts=None):
    cache = model.make_cache(len(ids), ids.size(1), starts=starts)
    parts = [model(part, cache=cache) for part in ids.split(sizes, dim=1)]
    assert cache.length == ids.size(1)
    return torch.cat(parts, dim=1)


@layers
@chunks
def test_cached_equals_uncached(mixers, sizes):
    model, ids = small(mixers), tokens(2, LENGTH)
    torch.testing.assert_close(cached(model, ids, sizes), model(ids).detach(), atol=SAME, rtol=0)


@pytest.mark.parametrize("positions", [LearnedPositions(), SinusoidalPositions()])
@chunks
def test_absolute_positions(positions, sizes):
    model, ids = small(LAYERS["no positions"], positions=positions), tokens(2, LENGTH)
    torch.testing.assert_close(cached(model, ids, sizes), model(ids).detach(), atol=SAME, rtol=0)


@layers
@chunks
@pytest.mark.parametrize("positions", [None, LearnedPositions()])
def test_rows_padded_on_the_left_are_as_if_alone(mixers, sizes, positions):
    model, ids = small(mixers, positions=positions), tokens(3, LENGTH)
    starts = torch.tensor([0, 13, 6])
    got = cached(model, ids, sizes, starts)
    for row, start in enumerate(starts.tolist()):
        alone = model(ids[row : row + 1, start:])[0].detach()
        torch.testing.assert_close(got[row, start:], alone, atol=SAME, rtol=0)
    assert got.isfinite().all()


@layers
@torch.inference_mode()
def test_rows_that_are_finished_leave(mixers):
    model, ids = small(mixers), tokens(3, LENGTH)
    starts = torch.tensor([4, 0, 9])
    cache = model.make_cache(3, LENGTH, starts=starts)
    model(ids[:, :20], cache=cache)
    rows = torch.tensor([2, 0])
    cache.select(rows)
    got = torch.cat([model(ids[rows, i : i + 1], cache=cache) for i in range(20, LENGTH)], dim=1)
    for row, logits in zip(rows.tolist(), got, strict=True):
        alone = model(ids[row : row + 1, starts[row] :])[0, -10:]
        torch.testing.assert_close(logits, alone, atol=SAME, rtol=0)


@layers
def test_a_step_builds_no_mask_once_all_rows_are_real(mixers, monkeypatch):
    def refuse(*_args):
        raise AssertionError("a mask was built")

    model, ids = small(mixers), tokens(2, LENGTH)
    cache = model.make_cache(2, LENGTH)
    model(ids[:, :10], cache=cache)
    monkeypatch.setattr(Context, "_row_mask", refuse)
    monkeypatch.setattr("lightning_lm.functional.attention.band", refuse)
    model(ids[:, 10:11], cache=cache)


@torch.inference_mode()
def test_a_window_bounds_the_memory():
    model = small((Attention(num_heads=4, window=5),), positions=None)
    cache = model.make_cache(1, 200)
    for part in tokens(1, 200).split([120] + [1] * 40 + [40], dim=1):
        model(part, cache=cache)
    assert cache.length == 200
    assert all(layer.keys.size(2) <= 10 for layer in cache.layers)


@torch.inference_mode()
def test_positions_may_be_given():
    model, ids = small(LAYERS["plain"], positions=LearnedPositions()), tokens(2, 9)
    cache = model.make_cache(2, 9)
    positions = torch.arange(9).expand(2, -1)
    parts = [
        model(ids[:, piece], position_ids=positions[:, piece], cache=cache) for piece in (slice(0, 5), slice(5, 9))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=SAME, rtol=0)


def test_bad_use_is_said():
    model = small(LAYERS["plain"])
    cache = model.make_cache(2, 8)
    with pytest.raises(ConfigurationError, match="max_length=8"):
        model(tokens(2, 9), cache=cache)
    with pytest.raises(ConfigurationError, match="holds 2 rows, but 1 came"):
        model(tokens(1, 3), cache=cache)
    with pytest.raises(ConfigurationError, match="documents cannot be cached"):
        model(tokens(2, 3), document_ids=torch.zeros(2, 3, dtype=torch.long), cache=cache)
    with pytest.raises(ConfigurationError, match="one column per row"):
        model.make_cache(2, 8, starts=torch.tensor([0, 1, 2]))


def test_sinks_are_one_more_key_without_a_value():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator, dtype=torch.float64)
    mixed = sink_attention(q, k, v, sinks, window=5)
    scores = q @ k.repeat_interleave(2, 1).mT / 2
    distance = torch.arange(9)[:, None] - torch.arange(9)
    weights = scores.exp() * ((distance >= 0) & (distance < 5))
    weights = weights / (weights.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    torch.testing.assert_close(mixed, weights @ v.repeat_interleave(2, 1), atol=SAME, rtol=0)
    nothing = sink_attention(q, k, v, torch.full((4,), 60.0, dtype=torch.float64))
    assert nothing.abs().max() < 1e-15

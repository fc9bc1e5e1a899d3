import sys

import pytest
import torch

from lightning_lm import kernels
from lightning_lm.functional.rope import rope_frequencies, rope_table

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def table(length, rotary_dim, *, interleaved=False):
    return rope_table(rope_frequencies(rotary_dim), length, interleaved=interleaved)


def turned(x, rotary_dim, interleaved):
    """Multiply each plane, read as a complex number, by that of its angle."""
    planes = rotary_dim // 2
    angles = torch.arange(x.size(1), dtype=torch.float64)[:, None] * rope_frequencies(rotary_dim)
    first, second = (
        (x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2])
        if interleaved
        else (x[..., :planes], x[..., planes:rotary_dim])
    )
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    parts = [product.real, product.imag]
    result = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((result, x[..., rotary_dim:]), -1)


def normed(x, gain, offset=0.0):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (gain + offset)


def made(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary"), [(3, 1, 16, 16), (4, 2, 40, 24), (1, 1, 2, 2)])
def test_rope(backend, agree, heads, kv_heads, dim, rotary, interleaved, dtype):
    cos, sin = table(3, rotary, interleaved=interleaved)
    agree(
        lambda q, k: kernels.rope(q, k, cos, sin, interleaved=interleaved),
        lambda q, k: (turned(q, rotary, interleaved), turned(k, rotary, interleaved)),
        made(2, 3, heads, dim, dtype=dtype),
        made(2, 3, kv_heads, dim, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_with_norms(backend, agree, interleaved, dtype):
    cos, sin = table(2, 24, interleaved=interleaved)
    agree(
        lambda q, k, a, b: kernels.rope(q, k, cos, sin, interleaved=interleaved, gains=(a, b), offset=1.0),
        lambda q, k, a, b: (turned(normed(q, a, 1.0), 24, interleaved), turned(normed(k, b, 1.0), 24, interleaved)),
        made(2, 2, 3, 33, dtype=dtype),
        made(2, 2, 1, 33, dtype=dtype),
        made(33, dtype=dtype),
        made(33, dtype=dtype),
    )


def test_heads_before_positions_and_a_table_for_each_row(backend, agree):
    cos, sin = (part.expand(2, -1, -1, -1) for part in table(3, 8))
    agree(
        lambda q, k: kernels.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin),
        lambda q, k: (turned(q.transpose(1, 2), 8, False), turned(k.transpose(1, 2), 8, False)),
        made(2, 3, 3, 8),
        made(2, 1, 3, 8),
    )
    agree(
        lambda q, k: kernels.rope(q[..., ::2], k, cos, sin)[1],
        lambda q, k: turned(k, 8, False) + 0 * q.sum(),
        made(2, 3, 2, 16),
        made(2, 3, 1, 8),
    )


def test_no_tokens_and_more_tokens_than_programs(backend, agree, monkeypatch):
    monkeypatch.setattr(sys.modules["lightning_lm.kernels.rope"], "_MOST_PROGRAMS", 3)
    cos, sin = table(8, 4)
    gains = made(4), made(4)
    for length in (0, 8):
        agree(
            lambda q, k, a, b: kernels.rope(q, k, cos[: q.size(1)], sin[: q.size(1)], gains=(a, b)),
            lambda q, k, a, b: (turned(normed(q, a), 4, False), turned(normed(k, b), 4, False)),
            made(1, length, 1, 4),
            made(1, length, 1, 4),
            *gains,
        )


def test_infinite_features_stay_in_their_plane(backend):
    q = torch.zeros(1, 2, 1, 6)
    q[..., 5] = torch.inf
    cos, sin = table(2, 4)
    result, _ = kernels.rope(q, torch.zeros(1, 2, 1, 6), cos, sin)
    assert torch.equal(result, q)

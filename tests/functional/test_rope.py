"""Rotations against complex numbers, frequencies against transformers and the papers' formulas."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_lm.functional.rope import (
    llama3_frequencies,
    ntk_base,
    rope_frequencies,
    rope_table,
    rotate,
    yarn_frequencies,
)

SINGLE = 1e-6  # float32 tables against float64, features of order 1
FREQUENCY = 1e-6  # relative; transformers computes frequencies in float32


def complex_rotation(x, positions, frequencies, interleaved):
    """Multiply each plane, read as a complex number, by ``exp(i position frequency)``."""
    x, rotary_dim = x.double(), 2 * len(frequencies)
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    angles = positions.double()[..., None, None] * frequencies
    planes = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    pair = (planes.real, planes.imag)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 4, 2])
@pytest.mark.parametrize("per_row", [False, True])
def test_rotation_is_complex_multiplication(interleaved, rotary_dim, per_row):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=generator)
    frequencies = rope_frequencies(rotary_dim)
    cos, sin = rope_table(frequencies, 40, interleaved=interleaved)
    positions = torch.tensor([[0, 1, 2, 0, 1], [7, 8, 9, 10, 39]]) if per_row else torch.arange(5)
    got = rotate(x, cos[positions], sin[positions], interleaved=interleaved)
    oracle = complex_rotation(x, positions, frequencies, interleaved)
    torch.testing.assert_close(got.double(), oracle, atol=SINGLE, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_of_a_rotation_is_the_rotation_back(interleaved):
    x = torch.randn(1, 6, 2, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    frequencies = rope_frequencies(4)
    cos, sin = rope_table(frequencies, 6, interleaved=interleaved)
    upstream = torch.randn(1, 6, 2, 4, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad(rotate(x, cos, sin, interleaved=interleaved), x, upstream)
    oracle = complex_rotation(upstream, -torch.arange(6), frequencies, interleaved)
    torch.testing.assert_close(got.double(), oracle, atol=SINGLE, rtol=0)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_table(rope_frequencies(16), 300)

    def score(i, j):
        at_i = rotate(q.view(1, 1, 1, -1), cos[i : i + 1], sin[i : i + 1])
        return (at_i * rotate(k.view(1, 1, 1, -1), cos[j : j + 1], sin[j : j + 1])).sum().item()

    assert score(7, 2) == pytest.approx(score(295, 290), abs=1e-5)
    assert score(7, 2) != pytest.approx(score(8, 2), abs=1e-2)


def test_far_positions_keep_their_angles():
    position = 1_000_003
    cos, sin = rope_table(rope_frequencies(8), position + 1)
    for plane in range(4):
        angle = position * 10_000.0 ** (-2 * plane / 8)
        assert cos[position, 0, plane].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[position, 0, plane + 4].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_half_precision_is_turned_in_float32():
    x = torch.randn(1, 64, 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rope_table(rope_frequencies(8), 64)
    got = rotate(x, cos, sin)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rotate(x.float(), cos, sin).bfloat16())


def reference(rope_parameters, *, head_dim=32, longest=4096):
    """Frequencies and table scale as transformers computes them."""
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=longest,
        rope_parameters={"rope_theta": 10_000.0, **rope_parameters},
    )
    return ROPE_INIT_FUNCTIONS[rope_parameters["rope_type"]](config, torch.device("cpu"))


@pytest.mark.parametrize("factor", [2.0, 8.0])
@pytest.mark.parametrize("original", [256, 2048])
def test_llama3_frequencies(factor, original):
    settings = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    oracle, _ = reference({"rope_type": "llama3", "original_max_position_embeddings": original, **settings})
    got = llama3_frequencies(rope_frequencies(32), original_context_length=original, **settings)
    torch.testing.assert_close(got.float(), oracle, atol=0, rtol=FREQUENCY)


@pytest.mark.parametrize("factor", [2.0, 16.0])
@pytest.mark.parametrize("original", [256, 2048])
@pytest.mark.parametrize("beta_fast", [32.0, 8.0])
def test_yarn_frequencies(factor, original, beta_fast):
    settings = {"factor": factor, "beta_fast": beta_fast, "beta_slow": 1.0}
    oracle, _ = reference({"rope_type": "yarn", "original_max_position_embeddings": original, **settings})
    frequencies = rope_frequencies(32)
    got = yarn_frequencies(frequencies, base=10_000.0, original_context_length=original, **settings)
    torch.testing.assert_close(got.float(), oracle, atol=0, rtol=FREQUENCY)
    assert got[0] == frequencies[0], "the fastest plane is kept"
    assert got[-1].item() == pytest.approx(frequencies[-1].item() / factor), "the slowest plane is interpolated"


def test_ntk_base_stretches_the_slowest_plane_by_the_factor():
    plain, stretched = rope_frequencies(64), rope_frequencies(64, ntk_base(10_000.0, 64, 8.0))
    assert stretched[0] == plain[0]
    assert stretched[-1].item() == pytest.approx(plain[-1].item() / 8)


def test_frequencies_are_written_in_the_paper():
    got = rope_frequencies(6, 1000.0)
    expected = [1.0, 1000 ** (-1 / 3), 1000 ** (-2 / 3)]
    assert got.tolist() == pytest.approx(expected, rel=1e-14)

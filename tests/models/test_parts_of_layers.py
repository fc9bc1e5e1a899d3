"""Norms, feed-forward layers and position tables against their formulas in float64."""

import math

import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.rope import ntk_base, rope_frequencies
from lightning_lm.models import (
    GLU,
    MLP,
    LayerNorm,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    NoNorm,
    NTKScaling,
    RMSNorm,
    Rope,
    SinusoidalPositions,
    YaRNScaling,
)

SINGLE = 2e-6  # float32 against float64, features of order 1
CPU = torch.device("cpu")


def features(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def fill(module):
    """Give every parameter other values than those it starts with."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def rms(x, eps):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def standardised(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize(
    ("part", "formula"),
    [
        (RMSNorm(eps=0.1), lambda x, p: rms(x, 0.1) * p["weight"]),
        (RMSNorm(eps=0.1, offset=1.0), lambda x, p: rms(x, 0.1) * (1 + p["weight"])),
        (RMSNorm(affine=False), lambda x, p: rms(x, 1e-6)),
        (RMSNorm(affine=False, offset=1.0), lambda x, p: rms(x, 1e-6)),
        (LayerNorm(eps=0.1), lambda x, p: standardised(x, 0.1) * p["weight"] + p["bias"]),
        (LayerNorm(bias=False), lambda x, p: standardised(x, 1e-5) * p["weight"]),
        (LayerNorm(affine=False), lambda x, p: standardised(x, 1e-5)),
        (NoNorm(), lambda x, p: x),
    ],
)
def test_norms(part, formula):
    module, x = fill(part.build(16)), features(2, 3, 16)
    expected = formula(x.double(), {name: value.double() for name, value in module.named_parameters()})
    torch.testing.assert_close(module(x).double(), expected, atol=SINGLE, rtol=0)


def test_an_offset_norm_starts_with_a_gain_of_one():
    module, plain = RMSNorm(offset=1.0).build(16), RMSNorm().build(16)
    assert module.weight.tolist() == [0.0] * 16
    assert torch.equal(module(features(4, 16)), plain(features(4, 16)))


FORMULAS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
}


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward(activation, bias, gated):
    part = GLU if gated else MLP
    module, x = fill(part(hidden_size=12, activation=activation, bias=bias).build(8)), features(2, 3, 8)

    def linear(name, y):
        layer = getattr(module, name)
        return y @ layer.weight.double().T + (layer.bias.double() if bias else 0)

    def activated(y):
        return y.detach().apply_(FORMULAS[activation])

    y = x.double()
    hidden = activated(linear("gate", y)) * linear("up", y) if gated else activated(linear("up", y))
    torch.testing.assert_close(module(x).double(), linear("down", hidden).detach(), atol=SINGLE, rtol=0)


def test_sinusoidal_positions_are_those_of_the_paper():
    module = SinusoidalPositions().build(8, 4)
    got = module(slice(0, 50), 50, CPU)
    for position in (0, 1, 3, 49):
        for i in range(4):
            angle = position / 10_000 ** (2 * i / 8)
            assert got[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert got[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert torch.equal(module(torch.tensor([[3, 49]]), 50, CPU)[0], got[[3, 49]])
    assert not module.state_dict()


def test_sinusoidal_positions_need_pairs():
    with pytest.raises(ConfigurationError, match="even d_model, got 7"):
        SinusoidalPositions().build(7, 4)


def test_learned_positions_learn_what_was_read():
    module = fill(LearnedPositions().build(4, 10))
    module(torch.tensor([[2, 2, 5]]), 6, CPU).sum().backward()
    assert module.weight.grad.sum(1).tolist() == [0, 0, 8, 0, 0, 4, 0, 0, 0, 0]
    assert torch.equal(module(slice(2, 4), 4, CPU), module.weight[2:4])


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [(LinearScaling(factor=4.0), [0, 4, 40]), (None, [0, 1, 10])],
)
def test_linear_scaling_divides_positions(scaling, positions):
    cos, sin = Rope(scaling=scaling).table(8, 41)
    plain_cos, plain_sin = Rope().table(8, 41)
    torch.testing.assert_close(cos[positions], plain_cos[[0, 1, 10]])
    torch.testing.assert_close(sin[positions], plain_sin[[0, 1, 10]])


def test_ntk_scaling_is_another_base():
    got = NTKScaling(factor=3.0).frequencies(16, 500.0)
    assert torch.equal(got, rope_frequencies(16, ntk_base(500.0, 16, 3.0)))


def test_yarn_sharpens_attention():
    assert YaRNScaling(factor=4.0).table_scale == pytest.approx(0.1 * math.log(4) + 1)  # arXiv:2309.00071, equation 22
    assert YaRNScaling(factor=4.0, attention_factor=1.5).table_scale == 1.5
    assert YaRNScaling(factor=0.5).table_scale == 1.0
    cos, _ = Rope(scaling=YaRNScaling(factor=4.0)).table(8, 1)
    assert cos[0].flatten().tolist() == pytest.approx([0.1 * math.log(4) + 1] * 8)


def test_llama3_scaling_keeps_fast_planes_and_slows_slow_ones():
    plain, scaled = rope_frequencies(64), Llama3Scaling(original_context_length=1024).frequencies(64, 10_000.0)
    turns = 1024 * plain / (2 * math.pi)
    torch.testing.assert_close(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_part_of_a_head_is_rotated():
    cos, sin = Rope(fraction=0.25).table(32, 4)
    assert cos.shape == sin.shape == (4, 1, 8)

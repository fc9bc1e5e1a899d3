"""Initial weights have the spread that their source gives, and come from one generator."""

import math

import pytest
import torch
from torch import nn

from lightning_lm.models import (
    Attention,
    DepthScaled,
    FanIn,
    Layer,
    LayerNorm,
    LearnedPositions,
    Normal,
    RMSNorm,
    TransformerConfig,
    TruncatedNormal,
)

NUM_LAYERS = 3
TOLERANCE = 0.05  # relative error of the spread of at least 2,048 draws: 1 / sqrt(2 * 2048) = 1.6 %, three of them


def model(init, **changes):
    layer = Layer(mixer=Attention(num_heads=4, bias="all"))
    config = TransformerConfig(
        d_model=32, num_layers=NUM_LAYERS, layers=layer, init=init, positions=LearnedPositions(), **changes
    )
    built = config.build(200)
    built.init_weights(torch.Generator().manual_seed(0))
    return built


def expected(init, name, shape):
    residual = name.endswith((".o.weight", ".down.weight"))
    embedding = name in ("embed.weight", "positions.weight")
    match init:
        case Normal():
            return 0.1
        case DepthScaled():
            return 0.1 / math.sqrt(2 * NUM_LAYERS) if residual else 0.1
        case FanIn():
            return 0.5 if embedding else 2.0 / math.sqrt(shape[1])
    bulk = 0.5 if embedding else math.sqrt(2 / sum(shape))
    return bulk * 0.98658  # standard deviation of a standard normal cut off at 3


@pytest.mark.parametrize(
    "init",
    [Normal(std=0.1), DepthScaled(std=0.1), FanIn(gain=2.0, embedding_std=0.5), TruncatedNormal(embedding_std=0.5)],
)
def test_spread(init):
    weights = {name: value for name, value in model(init).named_parameters() if value.dim() == 2}
    assert len(weights) == 3 + 7 * NUM_LAYERS
    for name, value in weights.items():
        spread = TOLERANCE if value.numel() >= 2048 else 3 / math.sqrt(2 * value.numel())
        assert value.std().item() == pytest.approx(expected(init, name, value.shape), rel=spread), name
        assert abs(value.mean().item()) < 4 * value.std().item() / math.sqrt(value.numel()), name


def test_truncation_cuts():
    for name, value in model(TruncatedNormal(std=0.2, embedding_std=0.2, cutoff=1.5)).named_parameters():
        if value.dim() == 2:
            assert value.abs().max() <= 0.3, name
            assert value.abs().max() > 0.29, name


@pytest.mark.parametrize("norm", [RMSNorm(), RMSNorm(offset=1.0), LayerNorm()])
def test_norms_start_as_identity_and_biases_at_zero(norm):
    built = model(Normal(), norm=norm)
    for parameter in built.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    built.init_weights()
    for name, value in built.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif value.dim() == 1:
            assert (value == 1 - getattr(norm, "offset", 0.0)).all(), name


def test_one_generator_decides_everything():
    first, second = model(DepthScaled()), model(DepthScaled())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    second.init_weights(torch.Generator().manual_seed(1))
    assert not any(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True) if a.dim() == 2
    )


def test_a_tied_weight_is_an_embedding():
    built = model(FanIn(gain=100.0, embedding_std=0.5), tie_embeddings=True)
    assert built.head.weight.std().item() == pytest.approx(0.5, rel=TOLERANCE)


@pytest.mark.parametrize(("init", "std"), [(FanIn(), 32**-0.5), (TruncatedNormal(), (2 / (32 + 64)) ** 0.5)])
def test_a_stack_of_matrices_is_drawn_as_each_of_them(init, std):
    stack = nn.Module()
    stack.weight = nn.Parameter(torch.empty(8, 64, 32))
    init.apply(stack, num_layers=1, generator=torch.Generator().manual_seed(0))
    assert stack.weight.std().item() == pytest.approx(std, rel=0.03)

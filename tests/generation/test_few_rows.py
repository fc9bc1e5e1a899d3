"""Linear layers over few rows: the numbers of torch's own, and layers that are as they were afterwards."""

import copy
import functools

import pytest
import torch
from torch import nn

from lightning_lm.generation import Generator, Sampling
from lightning_lm.generation.few_rows import few_rows_linear, few_rows_products
from lightning_lm.models import Attention, Layer, TransformerConfig


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 5), (3, 3), (8,), (), (0, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e18])
@torch.no_grad()
def test_equals_the_sum_in_float64(shape, bias, scale):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, 70, generator=generator) for size in (shape, (33,)))
    offset = torch.randn(33, generator=generator) if bias else None
    exact = (x.double() * scale) @ weight.double().T + (0 if offset is None else offset.double())
    found = few_rows_linear(x * scale, weight, offset)
    assert found.is_contiguous()
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_types_are_computed_by_torch(dtype):
    x, layer = torch.randn(1, 8, dtype=dtype), nn.Linear(8, 5, dtype=dtype)
    assert torch.equal(few_rows_linear(x, layer.weight, layer.bias), layer(x))


def test_gradients_reach_a_layer_that_is_called_meanwhile():
    layer = nn.Linear(8, 5)
    with few_rows_products(layer):
        layer(torch.randn(1, 8)).sum().backward()
    assert layer.weight.grad is not None


def test_layers_are_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LazyLinear(2))
    own = functools.partial(nn.Linear.forward, model[2])
    model[2].forward = own
    before = [dict(module.__dict__) for module in model.modules()]
    with few_rows_products(model, abs, model):
        assert "forward" in model[0].__dict__
        assert model[2].forward is own
        copy.deepcopy(model[0])(torch.ones(1, 4))
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_compiled_models_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].compile(backend="eager")
    with few_rows_products(model):
        assert "forward" not in model[0].__dict__


def test_generation_gives_the_layers_back():
    torch.manual_seed(0)
    model = TransformerConfig(vocab_size=9, d_model=8, num_layers=1, layers=Layer(mixer=Attention(num_heads=2))).build()
    generator = Generator(model)
    (completion,) = generator.generate([[1, 2]], sampling=Sampling(temperature=0), max_new_tokens=5)
    assert not any("forward" in module.__dict__ for module in model.modules())
    ids = [1, 2, *completion.token_ids]
    with torch.no_grad():
        assert model(torch.tensor([ids]))[0, 1:-1].argmax(-1).tolist() == list(completion.token_ids)

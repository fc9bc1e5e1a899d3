"""RMS normalisation against the formula in float64, and its written-out gradient against autograd's."""

import pytest
import torch

from lightning_lm.functional.rms_norm import rms_norm

EXACT = 1e-12
SINGLE = 1e-6  # float32, features of order 1


def naive(x, weight, eps):
    x = x.double()
    normalised = x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)
    return normalised if weight is None else normalised * weight.double()


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("has_weight", [True, False])
def test_values_and_gradients(shape, has_weight):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True) if has_weight else None
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = (x, weight) if has_weight else (x,)
    got, oracle = rms_norm(x, weight, eps=1e-3), naive(x, weight, 1e-3)
    torch.testing.assert_close(got, oracle, atol=EXACT, rtol=0)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(oracle, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=0)


def test_strided_features_and_a_frozen_gain():
    x = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mT.requires_grad_()
    weight = torch.full((8,), 2.0, dtype=torch.float64)
    (got,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x)
    (oracle,) = torch.autograd.grad(naive(x, weight, 1e-6).square().sum(), x)
    torch.testing.assert_close(got, oracle, atol=EXACT, rtol=0)


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e4, 1e15])
def test_tiny_and_huge_features(size, with_gradient):
    x = (torch.randn(2, 16, generator=torch.Generator().manual_seed(0)) * size).requires_grad_(with_gradient)
    weight = torch.ones(16)
    with torch.set_grad_enabled(with_gradient):
        got = rms_norm(x, weight)
    torch.testing.assert_close(got.double(), naive(x, weight, 1e-6), atol=SINGLE, rtol=SINGLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16,), (1, 1, 16), (2, 16)])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0, 1e15])
@torch.inference_mode()
def test_rows_of_inference(size, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator, dtype=dtype) * size,
        torch.randn(16, generator=generator).to(dtype),
    )
    torch.testing.assert_close(rms_norm(x, weight).double(), naive(x, weight, 1e-6), atol=SINGLE, rtol=SINGLE)
    assert rms_norm(x * 0, weight, eps=0.0).isnan().all()  # 0 / 0, as for several rows
    assert rms_norm(torch.full_like(x, torch.inf), weight).isnan().all()


def test_half_precision_is_computed_in_float32():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for weight in (torch.ones(64), torch.ones(64).bfloat16()):
        got = rms_norm(x, weight)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), naive(x, weight, 1e-6), atol=0, rtol=2**-8)  # one rounding


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_second_derivatives(trained):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (4,)))
    inputs = [tensor for tensor, wanted in zip((x, weight), trained, strict=True) if wanted]
    for tensor in inputs:
        tensor.requires_grad_()
    results = []
    for function in (lambda: rms_norm(x, weight, eps=1e-3), lambda: naive(x, weight, 1e-3)):
        first = torch.autograd.grad(function().pow(3).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=1e-10)

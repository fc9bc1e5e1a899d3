"""Symmetric products against float64, and the iteration that is made of them."""

import pytest
import torch

from lightning_lm.kernels.newton_schulz import symmetric_product
from lightning_lm.optim import orthogonalize

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1.1e-3}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 70), (150, 40)])
def test_one_triangle_and_its_mirror(backend, dtype, rows, columns):
    x = torch.randn(2, rows, columns).to(dtype)
    added = torch.randn(2, rows, rows)
    added = (added + added.mT).to(dtype)
    kept = x.clone()
    found = symmetric_product(x, added, alpha=0.3, beta=-2.0, least_rows=1)
    exact = 0.3 * x.double() @ x.double().mT - 2 * added.double()
    assert (found - exact).abs().max() <= BOUNDS[dtype] * exact.abs().max()
    assert torch.equal(found, symmetric_product(x, added, alpha=0.3, beta=-2.0, least_rows=1))
    assert torch.equal(x, kept)
    if backend == "triton":
        assert torch.equal(found, found.mT)


def test_rows_that_are_not_contiguous_and_nothing_added(backend):
    x = torch.randn(3, 20, 40).mT
    found = symmetric_product(x, least_rows=1, alpha=2.0)
    torch.testing.assert_close(found, 2 * x @ x.mT, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (2, 40, 40)])
def test_the_iteration_by_symmetric_products_is_the_same(backend, shape):
    matrices = torch.randn(shape)

    def product(x, added=None, *, alpha=1.0, beta=1.0):
        return symmetric_product(x, added, alpha=alpha, beta=beta, least_rows=1)

    ours = orthogonalize(matrices, dtype=torch.float32, symmetric_product=product)
    torch.testing.assert_close(ours, orthogonalize(matrices, dtype=torch.float32), atol=1e-4, rtol=0)

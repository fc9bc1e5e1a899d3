"""Products of sorted rows with a matrix per expert, against a loop over experts in float64."""

import pytest
import torch

from lightning_lm.kernels import force_backend, grouped_linear
from lightning_lm.kernels.runtime.launch_settings import trial

TILES = {"BLOCK": 16, "BLOCK_K": 16, "num_warps": 1, "num_stages": 1}


def loop(x, weight, counts):
    rows = x.split(counts.tolist())
    return torch.cat([part @ matrix.t() for part, matrix in zip(rows, weight, strict=True)])


def made(counts, inner, outer, dtype=torch.float32):
    x = torch.randn(sum(counts), inner).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), outer, inner).to(dtype).requires_grad_()
    return x, weight, torch.tensor(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("counts", "inner", "outer"),
    [
        ((0, 5, 0, 0, 37, 1, 0), 19, 33),  # experts without rows at both ends and inside, odd sizes
        ((35,), 16, 7),
        ((16, 0, 32), 17, 16),
        ((0, 0, 0), 5, 3),
    ],
)
def test_products_and_gradients(triton, agree, counts, inner, outer, dtype):
    with trial("grouped_linear", TILES):
        agree(grouped_linear, loop, *made(counts, inner, outer, dtype))


def test_tiles_as_they_are_launched(triton, agree):
    agree(grouped_linear, loop, *made((3, 0, 66), 40, 70))


def test_rows_and_gradients_that_are_not_contiguous(triton, agree):
    x, weight, counts = made((4, 9), 6, 10)
    with trial("grouped_linear", TILES):
        turned = x.detach().t().contiguous().requires_grad_(), weight.detach().mT.contiguous().requires_grad_()
        agree(lambda a, w: grouped_linear(a.t(), w.mT, counts), lambda a, w: loop(a.t(), w.mT, counts), *turned)
        wide = torch.randn(13, 12).requires_grad_()
        agree(lambda a, w: grouped_linear(a[:, 3:9], w, counts), lambda a, w: loop(a[:, 3:9], w, counts), wide, weight)
        expanded = torch.autograd.grad(grouped_linear(x, weight, counts).sum(), (x, weight))
        written = torch.autograd.grad(loop(x, weight, counts).sum(), (x, weight))
    torch.testing.assert_close(expanded, written)


def test_on_a_cpu_the_loop_runs_unless_triton_is_forced():
    x, weight, counts = made((2, 0, 3), 4, 5)
    torch.testing.assert_close(grouped_linear(x, weight, counts, prefer_triton=True), loop(x, weight, counts))
    with force_backend("torch"):
        torch.testing.assert_close(grouped_linear(x, weight, counts), loop(x, weight, counts))

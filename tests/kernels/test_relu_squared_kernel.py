import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lm import kernels
from lightning_lm.errors import ConfigurationError
from lightning_lm.kernels.swap.swap import swap
from lightning_lm.models import GLU, MLP

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def oracle(x):
    return torch.where(x > 0, x * x, torch.zeros_like(x))


def made(*shape, dtype=torch.float32, scale=3.0):
    return (scale * torch.randn(shape)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, 1000, 4100])
def test_relu_squared(backend, agree, size, dtype):
    agree(kernels.relu_squared, oracle, made(1 if size == 4100 else 3, size, dtype=dtype), floor=1.0)


@pytest.mark.parametrize("slice_of", [lambda x: x[:, 3:40], lambda x: x.mT, lambda x: x[::2], lambda x: x[0, 0]])
def test_slices_and_a_single_number(backend, agree, slice_of):
    agree(lambda x: kernels.relu_squared(slice_of(x)), lambda x: oracle(slice_of(x)), made(5, 66))


def test_no_rows(backend, agree):
    agree(kernels.relu_squared, oracle, made(0, 7))


def test_extreme_values(backend):
    x = torch.tensor([-torch.inf, -3e38, -0.0, 0.0, 1e-30, 1e19, 3e38, torch.inf, torch.nan]).requires_grad_()
    result = kernels.relu_squared(x)
    (slopes,) = torch.autograd.grad(result.sum(), x)
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1e38, torch.inf, torch.inf, torch.nan])
    torch.testing.assert_close(result.detach(), expected, rtol=1e-6, atol=0, equal_nan=True)
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 2e-30, 2e19, torch.inf, torch.inf, torch.nan])
    torch.testing.assert_close(slopes, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_float64_is_left_to_torch(agree):
    agree(kernels.relu_squared, oracle, made(3, 5).double().detach().requires_grad_())
    with kernels.force_backend("triton"), pytest.raises(ConfigurationError, match="float64"):
        kernels.relu_squared(torch.zeros(3, dtype=torch.float64))


class Plain(nn.Module):
    """Somebody's feed-forward layer."""

    def __init__(self, activation, dropout=None):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(8, 32), nn.Linear(32, 8)
        self.activation = activation
        if dropout is not None:
            self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


@pytest.mark.parametrize(
    ("layer", "kernel", "reason"),
    [
        (Plain(lambda x: F.relu(x).square()), "relu_squared", ""),
        (Plain(F.gelu), "", "it computes something else than relu_squared"),
        (Plain(oracle, dropout=0.1), "", "it also holds drop, a Dropout"),
        (MLP(activation="relu2", bias=True).build(8), "relu_squared", ""),
        (MLP(activation="relu").build(8), "", "it computes something else than relu_squared"),
        (GLU(activation="relu2").build(8), "", "it computes something else than swiglu, geglu"),
    ],
)
def test_what_is_exchanged_and_why_not(layer, kernel, reason):
    (entry,) = swap(layer)
    assert (entry.kernel, bool(entry.reason)) == (kernel, bool(reason))
    assert reason in entry.reason


def test_a_layer_runs_it_after_a_swap(triton, agree):
    layer = MLP(activation="relu2").build(8)
    maps = [parameter.detach().double() for parameter in layer.parameters()]
    (entry,) = swap(layer)
    assert entry.kernel == "relu_squared"
    agree(layer, lambda x: oracle(x @ maps[0].T) @ maps[1].T, made(2, 3, 8))

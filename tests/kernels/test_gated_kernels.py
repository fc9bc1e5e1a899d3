import pytest
import torch
import torch.nn.functional as F

from lightning_lm import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNITS = {
    "silu": (kernels.swiglu, F.silu),
    "gelu": (kernels.geglu, F.gelu),
    "gelu_tanh": (
        lambda gate, up: kernels.geglu(gate, up, approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
}


def made(*shape, dtype=torch.float32, scale=3.0):
    return (scale * torch.randn(shape)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, 1000, 4100])
@pytest.mark.parametrize("unit", UNITS)
def test_gated_unit(backend, agree, unit, size, dtype):
    function, activation = UNITS[unit]
    rows = 1 if size == 4100 else 3
    gate, up = made(rows, size, dtype=dtype), made(rows, size, dtype=dtype)
    agree(function, lambda gate, up: activation(gate) * up, gate, up, floor=1.0)


@pytest.mark.parametrize("unit", UNITS)
def test_halves_of_one_projection(backend, agree, unit):
    function, activation = UNITS[unit]
    agree(lambda x: function(*x.chunk(2, -1)), lambda x: activation(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], made(3, 66))
    agree(function, lambda gate, up: activation(gate) * up, made(0, 7), made(0, 7))


@pytest.mark.parametrize("unit", UNITS)
def test_extreme_gates(backend, agree, unit):
    function, activation = UNITS[unit]
    gate = torch.tensor([-3e38, -1e20, -100.0, -20.0, 0.0, 20.0, 100.0, 1e20, 3e38]).requires_grad_()
    up = torch.ones(9).requires_grad_()
    near = gate.detach().clamp(-1000, 1000).double().requires_grad_()
    slopes = torch.autograd.grad(activation(near).sum(), near)[0]
    result = function(gate, up)
    grads = torch.autograd.grad(result.sum(), (gate, up))
    torch.testing.assert_close(result.double(), torch.where(gate > 0, gate.double(), 0.0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads[0].double(), slopes, rtol=1e-6, atol=1e-6)
    assert torch.equal(grads[1], result)

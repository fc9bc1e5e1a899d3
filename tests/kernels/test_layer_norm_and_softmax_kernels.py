import pytest
import torch
import torch.nn.functional as F

from lightning_lm import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def made(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def norm_oracle(x, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, 1000, 4100])
def test_layer_norm(backend, agree, size, dtype):
    inputs = made(5, size, dtype=dtype), made(size, dtype=dtype), made(size, dtype=dtype)
    # The norm of a single feature is nothing but the bias: its gradient is the cancellation of terms of 1 / sqrt(eps).
    agree(kernels.layer_norm, norm_oracle, *inputs, floor=300.0 if size == 1 else 0.0)


def test_layer_norm_without_gain_or_bias_and_of_slices(backend, agree):
    agree(lambda x: kernels.layer_norm(x, None), norm_oracle, made(3, 5))
    agree(lambda x, w: kernels.layer_norm(x, w), norm_oracle, made(2, 3, 8), made(8))
    agree(lambda x, b: kernels.layer_norm(x, None, b), lambda x, b: norm_oracle(x, None, b), made(3, 8), made(8))
    agree(kernels.layer_norm, norm_oracle, made(0, 8), made(8), made(8))
    agree(lambda x, w: kernels.layer_norm(x[:, 3:9], w), lambda x, w: norm_oracle(x[:, 3:9], w), made(4, 12), made(6))
    agree(kernels.layer_norm, norm_oracle, made(300, 8), made(8), made(8))


def test_layer_norm_far_from_zero(backend, agree):
    x = (1000 + torch.randn(3, 64)).requires_grad_()
    agree(kernels.layer_norm, norm_oracle, x, made(64), made(64), bound=2e-4)  # 1000 / 2^24 of a deviation of 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, 1000, 4100])
def test_softmax(backend, agree, size, dtype):
    agree(kernels.softmax, lambda x: x.softmax(-1), made(5, size, dtype=dtype), floor=0.5 if size == 1 else 0.0)


def test_softmax_of_masked_rows_and_slices(backend, agree):
    x = torch.randn(4, 9)
    x[0, 2:] = -torch.inf
    x[1] = -torch.inf
    x[2] = 3e4
    agree(
        kernels.softmax,
        lambda x: (
            x.masked_fill((x == -torch.inf).all(-1, keepdim=True), 0.0).softmax(-1)
            * (x > -torch.inf).any(-1, keepdim=True)
        ),
        x.requires_grad_(),
    )
    agree(lambda x: kernels.softmax(x.mT), lambda x: x.mT.softmax(-1), made(2, 3, 5))
    agree(kernels.softmax, lambda x: x.softmax(-1), made(0, 5))

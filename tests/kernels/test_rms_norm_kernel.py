import pytest
import torch

from lightning_lm import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def oracle(x, weight=None, residual=None, *, eps=1e-6, offset=0.0):
    total = x if residual is None else x + residual
    unit = total / (total.square().mean(-1, keepdim=True) + eps).sqrt()
    result = unit if weight is None else unit * (offset + weight)
    return result if residual is None else (result, total)


def made(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, 1000, 4100])
def test_rms_norm(backend, agree, size, dtype):
    x = made(5, size, dtype=dtype)
    # The norm of a single feature is its sign: in its gradient two terms of size 1 / x cancel.
    agree(kernels.rms_norm, oracle, x, made(size, dtype=dtype), floor=3 / x.abs().min().item() if size == 1 else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemma_with_a_residual(backend, agree, dtype):
    def function(x, residual, weight):
        return kernels.rms_norm(x, weight, residual=residual, offset=1.0)

    def exact(x, residual, weight):
        rounded = x + residual + ((x + residual).to(dtype).double() - (x + residual)).detach()
        return oracle(rounded, weight, offset=1.0), x + residual

    agree(function, exact, made(2, 3, 70, dtype=dtype), made(2, 3, 70, dtype=dtype), made(70, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_too_long_for_one_program(backend, agree, dtype):
    size = 8192 + 300
    agree(kernels.rms_norm, oracle, made(3, size, dtype=dtype), made(size, dtype=dtype))
    agree(lambda x: kernels.rms_norm(x, None), oracle, made(2, size, dtype=dtype))


def test_long_rows_with_a_residual_and_more_rows_than_chunks(backend, agree):
    size = 8200

    def function(x, residual, weight):
        return kernels.rms_norm(x, weight, residual=residual, offset=1.0)

    agree(function, lambda x, r, w: oracle(x, w, r, offset=1.0), made(9, size), made(9, size), made(size))
    for index in (0, 1):
        agree(
            lambda x, r, w, index=index: function(x, r, w)[index],
            lambda x, r, w, index=index: oracle(x, w, r, offset=1.0)[index] + 0 * (x.sum() + r.sum() + w.sum()),
            made(1, size),
            made(1, size),
            made(size),
        )


def test_a_gain_of_another_type_keeps_its_own(backend, agree):
    x, weight = made(7, 48, dtype=torch.bfloat16), made(48)
    agree(kernels.rms_norm, oracle, x, weight, bound=8e-3)
    kernels.rms_norm(x, weight).sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_no_gain_no_rows_and_rows_that_are_not_contiguous(backend, agree):
    agree(lambda x: kernels.rms_norm(x, None), oracle, made(3, 5))
    agree(kernels.rms_norm, oracle, made(0, 8), made(8))
    agree(
        lambda x, w: kernels.rms_norm(x.transpose(0, 1), w),
        lambda x, w: oracle(x.transpose(0, 1), w),
        made(6, 4),
        made(6),
    )
    agree(lambda x, w: kernels.rms_norm(x[:, 3:9], w), lambda x, w: oracle(x[:, 3:9], w), made(4, 12), made(6))


def test_more_rows_than_programs_and_gradients_that_are_absent(backend, agree):
    agree(kernels.rms_norm, oracle, made(300, 8), made(8))
    for index in (0, 1):
        agree(
            lambda x, r, w, index=index: kernels.rms_norm(x, w, residual=r)[index],
            lambda x, r, w, index=index: oracle(x, w, r)[index] + 0 * (x.sum() + r.sum() + w.sum()),
            made(4, 16),
            made(4, 16),
            made(16),
        )


def test_extreme_values(backend, agree):
    x = torch.tensor([[1e18, -1e18, 0, 1], [1e-30, 0, 0, 0], [0, 0, 0, 0]]).requires_grad_()
    agree(kernels.rms_norm, oracle, x, made(4))
    big = torch.full((1, 8), 60000.0, dtype=torch.float16).requires_grad_()
    agree(kernels.rms_norm, oracle, big, made(8, dtype=torch.float16))


def test_rounded_first_as_the_llama_of_transformers(backend):
    x, weight = torch.randn(6, 96, dtype=torch.bfloat16), torch.randn(96, dtype=torch.bfloat16)
    wide = x.float()
    theirs = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
    assert torch.equal(kernels.rms_norm(x, weight, eps=1e-5, round_first=True), theirs)
    long, gain = x.repeat(1, 100), weight.repeat(100)
    assert torch.equal(kernels.rms_norm(long, gain, eps=1e-5, round_first=True), theirs.repeat(1, 100))


def test_kernel_and_reference_round_alike(triton):
    x, weight = made(9, 257, dtype=torch.bfloat16), made(257)
    ours = kernels.rms_norm(x, weight)
    with kernels.force_backend("torch"):
        reference = kernels.rms_norm(x, weight)
    differing = (ours != reference).float().mean()
    assert differing < 0.01  # the last bit of a sum in float32, where it decides a rounding

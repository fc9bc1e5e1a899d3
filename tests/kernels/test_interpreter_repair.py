"""bfloat16 in the interpreter is as on hardware: without that no other test of a kernel in bfloat16 proves a thing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_lm.kernels.runtime.launch import jit, launch

if TYPE_CHECKING:
    import triton.language as tl


@jit
def _copy_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0)
    tl.store(out_ptr + offsets, x.to(tl.bfloat16), mask=offsets < size)


@jit
def _compute_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    tl.store(out_ptr + offsets, x * y)
    tl.store(out_ptr + SIZE * SIZE + offsets, -(x + y))
    tl.store(out_ptr + 2 * SIZE * SIZE + offsets, tl.where(x > y, x, y))
    tl.store(out_ptr + 3 * SIZE * SIZE + offsets, tl.dot(x, y).to(tl.bfloat16))
    total = tl.sum(x, axis=1, keep_dims=True).to(tl.bfloat16)
    tl.store(out_ptr + 4 * SIZE * SIZE + offsets, tl.broadcast_to(total, (SIZE, SIZE)))


def test_casts_round_to_nearest_even(triton):
    x = torch.cat([torch.randn(200), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3e38])])
    found = torch.empty(len(x), dtype=torch.bfloat16)
    launch(_copy_kernel, (1,), x, found, len(x), BLOCK=256)
    assert torch.equal(found.view(torch.int16), x.bfloat16().view(torch.int16))
    launch(_copy_kernel, (1,), torch.tensor([torch.nan]), found, 1, BLOCK=256)
    assert found[0].isnan()


def test_arithmetic_reductions_and_dot(triton):
    x, y = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    found = torch.empty(5, 16, 16, dtype=torch.bfloat16)
    launch(_compute_kernel, (1,), x, y, found, SIZE=16)
    assert torch.equal(found[0], x * y)
    assert torch.equal(found[1], -(x + y))
    assert torch.equal(found[2], torch.maximum(x, y))
    torch.testing.assert_close(found[3].float(), x.float() @ y.float(), rtol=4e-3, atol=1e-5)
    torch.testing.assert_close(found[4].float(), x.float().sum(1, keepdim=True).expand(16, 16), rtol=4e-3, atol=1e-5)

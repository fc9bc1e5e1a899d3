"""Kernels run in Triton's interpreter, on a CPU, as they are; bfloat16 is put right where the interpreter is wrong."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_lm.kernels import force_backend


@pytest.fixture(scope="session")
def _interpreter():
    """Load Triton, which reads `TRITON_INTERPRET` (set by the root conftest) once and for all."""
    pytest.importorskip("triton")
    import triton.language as tl
    from triton.runtime import interpreter

    message = "TRITON_INTERPRET=1 must be set before Triton is imported; something imported it before tests/conftest.py"
    assert os.environ.get("TRITON_INTERPRET") == "1", message
    assert type(tl.sum) is interpreter.InterpretedFunction, message
    path = Path(__file__).with_name("bf16_interpreter.py")
    spec = importlib.util.spec_from_file_location("bf16_interpreter", path)
    repairs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = repairs
    spec.loader.exec_module(repairs)
    repairs.repair(interpreter, tl)
    with np.errstate(all="ignore"):  # an overflow says nothing on a GPU
        yield


@pytest.fixture
def triton(_interpreter):
    """Force every operation to run in Triton's interpreter: a kernel that cannot run fails the test."""
    with force_backend("triton"):
        yield


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    """Run the test by the kernels and by their torch references."""
    if request.param == "triton":
        request.getfixturevalue("_interpreter")
    with force_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


BOUNDS = {torch.float32: 2e-6, torch.float16: 1.1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-13}
"""Largest error over the largest value: rounding of the result, a few times over for gradients that are sums."""


def as_tuple(value):
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def run(function, inputs, upstream):
    """Return the results and the gradients of inputs that require them."""
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
    results = as_tuple(function(*leaves))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    weighted = [(result, grad.to(result.dtype)) for result, grad in zip(results, upstream, strict=True)]
    weighted = [(result, grad) for result, grad in weighted if result.requires_grad]
    if not weighted or not wanted:
        return [*results]
    differentiable, gradients = zip(*weighted, strict=True)
    return [*results, *torch.autograd.grad(differentiable, wanted, gradients)]


@pytest.fixture
def agree():
    """Return a function that compares an operation with its oracle, forward and backward.

    It also checks that inputs are left alone and that a second run gives the same bits. The error may be `bound` times
    the largest value, or times `floor` where large terms cancel.
    """

    def compare(function, oracle, *inputs, bound=None, floor=0.0):
        kept = [tensor.detach().clone() for tensor in inputs]
        double = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs]
        results = as_tuple(oracle(*double))
        upstream = [torch.randn_like(result) for result in results]
        expected = run(oracle, double, upstream)
        found, again = run(function, inputs, upstream), run(function, inputs, upstream)
        for value, repeated, reference in zip(found, again, expected, strict=True):
            assert value.shape == reference.shape
            assert torch.equal(value, repeated), "a second run differs"
            if value.numel() == 0:
                continue
            limit = BOUNDS[value.dtype] if bound is None else bound
            error, size = (value.double() - reference).abs().max(), reference.abs().max().clamp(min=floor)
            smallest = torch.finfo(value.dtype).smallest_normal * torch.finfo(value.dtype).eps
            assert error <= limit * size + smallest, (value.dtype, (error / size).item())
        for tensor, before in zip(inputs, kept, strict=True):
            assert torch.equal(tensor.detach(), before), "an input was written to"

    return compare

"""What every operation promises, whatever it computes: one case for each, by the kernels and by torch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from lightning_lm import kernels
from lightning_lm.functional.rope import rope_frequencies, rope_table

TARGETS = torch.tensor([1, -100, 3])
ROTATION = rope_table(rope_frequencies(4), 2)


def heads(x):
    return x.view(1, 2, -1, 4)


CASES = {
    "rms_norm": (lambda x, w: kernels.rms_norm(x, w), (3, 8), (8,)),
    "rms_norm_residual": (lambda x, r, w: kernels.rms_norm(x, w, residual=r, offset=1.0), (3, 8), (3, 8), (8,)),
    "layer_norm": (kernels.layer_norm, (3, 8), (8,), (8,)),
    "softmax": (kernels.softmax, (3, 8)),
    "relu_squared": (kernels.relu_squared, (3, 8)),
    "swiglu": (kernels.swiglu, (3, 8), (3, 8)),
    "geglu": (kernels.geglu, (3, 8), (3, 8)),
    "rope": (lambda q, k: kernels.rope(heads(q), heads(k), *ROTATION), (2, 8), (2, 4)),
    "rope_norms": (
        lambda q, k, a, b: kernels.rope(heads(q), heads(k), *ROTATION, gains=(a, b)), (2, 8), (2, 4), (4,), (4,)
    ),
    "flash_attention": (
        lambda q, k: kernels.flash_attention(*(heads(x).transpose(1, 2) for x in (q, k, 2 * k))), (2, 8), (2, 4)
    ),
    "cross_entropy": (lambda x: kernels.cross_entropy(x, TARGETS, label_smoothing=0.1).loss_sum, (3, 8)),
    "linear_cross_entropy": (
        lambda h, w: kernels.linear_cross_entropy(h, w, TARGETS, budget_bytes=100).loss_sum, (3, 8), (6, 8)
    ),
    "linear_logprob": (
        lambda h, w: tuple(kernels.linear_logprob(h, w, TARGETS, entropy_gradient=True, budget_bytes=100)),
        (3, 8),
        (6, 8),
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    function, *shapes = CASES[request.param]
    return function, [torch.randn(shape).requires_grad_() for shape in shapes]


def total(results):
    """Some number that depends on all of every result, with an upstream gradient that is not one."""
    results = results if isinstance(results, tuple) else (results,)
    return sum((0.5 * result * torch.linspace(1, 2, result.numel()).view(result.shape)).sum() for result in results)


def gradients(function, inputs):
    return torch.autograd.grad(total(function(*inputs)), inputs)


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Calls(TorchDispatchMode):
    """Remembers the calls of our operators."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lightning_lm":
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


def test_the_operator_keeps_the_rules_of_torch(backend, case):
    function, inputs = case
    with Calls() as calls:
        function(*inputs)
    ((operator, arguments),) = calls.found
    checks = torch.library.opcheck(operator, arguments)
    assert len(checks) == 4
    assert set(checks.values()) == {"SUCCESS"}


def test_compiled_as_one_graph_and_bit_for_bit_like_eager(backend, case):
    function, inputs = case
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert same(gradients(compiled, inputs), gradients(function, inputs))
    ours, theirs = function(*inputs), compiled(*inputs)
    assert same(*((value if isinstance(value, tuple) else (value,)) for value in (ours, theirs)))


def test_a_second_derivative_is_refused(backend, case):
    function, inputs = case
    grads = torch.autograd.grad(total(function(*inputs)), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|does not require grad"):
        torch.autograd.grad(sum(grad.sum() for grad in grads), inputs)


def test_a_graph_that_is_kept_gives_the_same_gradients_again(backend, case):
    function, inputs = case
    loss = total(function(*inputs))
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert same(first, torch.autograd.grad(loss, inputs))


def test_recomputed_in_the_backward_pass(backend, case):
    function, inputs = case
    recomputed = gradients(lambda *tensors: checkpoint(function, *tensors, use_reentrant=False), inputs)
    assert same(recomputed, gradients(function, inputs))


@pytest.mark.parametrize("kept", [True, False])
def test_selective_checkpointing_goes_by_the_name_of_the_operator(triton, case, kept):
    function, inputs = case
    with Calls() as calls:
        function(*inputs)
    operator = calls.found[0][0]
    names = [operator] if kept else [torch.ops.aten.mm.default]

    def inner(*tensors):
        return function(*(2 * tensor for tensor in tensors))

    with Calls() as calls:
        loss = total(
            checkpoint(
                inner, *inputs, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(names)
            )
        )
        found = torch.autograd.grad(loss, inputs)
    assert [called for called, _ in calls.found].count(operator) == (1 if kept else 2)
    assert same(found, gradients(inner, inputs))


def test_frozen_inputs_get_no_gradient(backend, case):
    function, inputs = case
    inputs[-1] = inputs[-1].detach()
    if len(inputs) == 1:
        assert not total(function(*inputs)).requires_grad
        return
    whole = gradients(function, [*inputs[:-1], inputs[-1].clone().requires_grad_()])
    found = torch.autograd.grad(total(function(*inputs)), inputs[:-1])
    assert same(found, whole[:-1])


def test_under_autocast_parameters_get_gradients_of_their_own_type(backend, case):
    function, inputs = case
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(function, [inputs[0].detach().bfloat16().requires_grad_(), *inputs[1:]])
    assert [grad.dtype for grad in found] == [torch.bfloat16, *(torch.float32 for _ in inputs[1:])]


def test_products_are_counted(backend):
    kernels.register_flops()
    hidden, weight = torch.randn(3, 8).requires_grad_(), torch.randn(6, 8).requires_grad_()
    for function, products in ((kernels.linear_cross_entropy, 3), (kernels.linear_logprob, 4)):
        with FlopCounterMode(display=False) as counter:
            function(hidden, weight, TARGETS)[0].sum().backward()
        assert counter.get_total_flops() == products * 2 * 3 * 8 * 6

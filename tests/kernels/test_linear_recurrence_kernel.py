"""Linear recurrences by the kernel between chunks, against the recurrence token by token in float64."""

import importlib.machinery
import itertools
import sys
import types

import pytest
import torch

from lightning_lm import kernels
from lightning_lm.functional.linear_recurrence import stepwise_recurrence
from lightning_lm.kernels.recurrence import operation
from lightning_lm.kernels.recurrence.chunk_scan import scan_chunks

DOCUMENTS = torch.tensor([[0] * 9 + [1] + [2] * 60, [0] * 64 + [1] * 6])
ARGUMENTS = {"linear": "", "ssd": "g", "gated_linear": "G", "delta": "b", "gated_delta": "gb"}


def made(kind, batch=2, length=70, heads=2, key_dim=5, value_dim=19, dtype=torch.float32):
    def draw(*shape):
        return torch.randn(batch, length, *shape)

    q, k, v = draw(1, key_dim), draw(1, key_dim), draw(heads, value_dim)
    given = [q * key_dim**-0.5, torch.nn.functional.normalize(k, dim=-1), v]
    of_kind = {"g": -draw(heads).abs(), "G": -draw(heads, key_dim).abs(), "b": draw(heads).sigmoid()}
    given += [of_kind[name] for name in ARGUMENTS[kind]]
    return [x.to(dtype).requires_grad_() for x in given]


def of(run, kind, **options):
    """Return the recurrence as a function of its tensors alone."""

    def call(q, k, v, *rest):
        named = dict(zip(ARGUMENTS[kind], rest, strict=False))
        start = rest[len(named)] if len(rest) > len(named) else None
        decay = named.get("g", named.get("G"))
        return run(q, k, v, decay, beta=named.get("b"), state=start, **options)

    return call


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_packed_documents_and_a_state_handed_in(triton, agree, kind):
    inputs = [*made(kind), torch.randn(2, 2, 5, 19).requires_grad_()]
    ours, exact = (of(run, kind, document_ids=DOCUMENTS) for run in (kernels.linear_recurrence, stepwise_recurrence))
    agree(ours, exact, *inputs, bound=2e-5)


def test_decays_that_leave_nothing(triton, agree):
    q, k, v, decay = made("ssd", batch=1, length=33)
    decay = (200 * decay).detach().requires_grad_()
    agree(of(kernels.linear_recurrence, "ssd"), of(stepwise_recurrence, "ssd"), q, k, v, decay, bound=2e-5, floor=1.0)


def test_half_precision_keeps_its_sums_in_float32(triton, agree):
    inputs = made("gated_delta", batch=1, length=20, dtype=torch.bfloat16)
    agree(of(kernels.linear_recurrence, "gated_delta"), of(stepwise_recurrence, "gated_delta"), *inputs, bound=1.5e-2)


@pytest.mark.parametrize("delta", [True, False])
def test_the_torch_form_of_the_scan_is_exact_and_so_are_its_gradients(delta):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 2, 3, 4, 2), (1, 2, 3, 4, 3), (1, 2, 3, 4, 3), (1, 1, 3, 1, 1), (1, 2, 3, 2)
    values, removed, keys, keep, state = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    given = (values, removed if delta else None, keys, keep, state)
    assert torch.autograd.gradcheck(scan_chunks, given)
    if delta:
        compiled = torch.compile(scan_chunks, fullgraph=True, backend="aot_eager")(*given)
        torch.testing.assert_close(compiled, scan_chunks(*given), rtol=0, atol=0)


def stub(calls):
    """A package with the documented functions: [1, tokens, heads, dim] and ``cu_seqlens``, or whole rows."""

    def run(name, q, k, v, g=None, beta=None, *, scale, initial_state=None, output_final_state, cu_seqlens=None):
        calls.append(name)
        assert output_final_state
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        if cu_seqlens is None:
            return stepwise_recurrence(q * scale, k, v, g, beta=beta, state=initial_state)
        assert initial_state is None
        assert len(q) == 1
        bounds = cu_seqlens.tolist()
        pieces = [
            stepwise_recurrence(*(None if x is None else x[:, a:b] for x in (q * scale, k, v, g)),
                                beta=None if beta is None else beta[:, a:b])
            for a, b in itertools.pairwise(bounds)
        ]  # fmt: skip
        return torch.cat([out for out, _ in pieces], 1), torch.cat([after for _, after in pieces])

    modules = {"fla": types.ModuleType("fla"), "fla.ops": types.ModuleType("fla.ops")}
    modules["fla"].__spec__ = importlib.machinery.ModuleSpec("fla", None)
    for name, function in {"gated_delta_rule": "chunk_gated_delta_rule", "delta_rule": "chunk_delta_rule",
                           "simple_gla": "chunk_simple_gla", "gla": "chunk_gla"}.items():  # fmt: skip
        modules[f"fla.ops.{name}"] = types.ModuleType(f"fla.ops.{name}")
        setattr(modules[f"fla.ops.{name}"], function, lambda *a, _name=function, **o: run(_name, *a, **o))
    return modules


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["ssd", "gated_linear", "delta", "gated_delta"])
def test_flash_linear_attention_where_it_is_installed(monkeypatch, kind, packed):
    calls = []
    for name, module in stub(calls).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(operation, "use_triton", lambda name, device, reason: reason is None)
    inputs = made(kind, dtype=torch.bfloat16)
    options = {"document_ids": DOCUMENTS} if packed else {}
    start = [] if packed else [torch.randn(2, 2, 5, 19)]
    found, after = of(kernels.linear_recurrence, kind, **options)(*inputs, *start)
    assert len(calls) == 1
    wanted, end = of(stepwise_recurrence, kind, **options)(*(x.double() for x in (*inputs, *start)))
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(after.double(), end, rtol=2e-2, atol=5e-2)
    assert found.dtype == torch.bfloat16
    assert after.dtype == torch.float32


def test_why_not_flash_linear_attention(monkeypatch):
    reasons = []
    monkeypatch.setattr(operation, "use_triton", lambda name, device, reason: reasons.append(reason) is not None)

    def reason(kind, dtype=torch.bfloat16, state=None, documents=None):
        of(kernels.linear_recurrence, kind, document_ids=documents)(*made(kind, dtype=dtype), *state or ())
        return reasons[-1]

    assert "pip install flash-linear-attention" in reason("gated_delta")
    for name, module in stub([]).items():
        monkeypatch.setitem(sys.modules, name, module)
    assert "float16 or bfloat16" in reason("gated_delta", torch.float32)
    assert "without a decay" in reason("linear")
    assert "a state from before" in reason("ssd", state=[torch.randn(2, 2, 5, 19)], documents=DOCUMENTS)
    monkeypatch.undo()
    of(kernels.linear_recurrence, "ssd")(*made("ssd"))
    (choice,) = (one for one in kernels.choices("cpu") if one.operation == "flash_linear_attention")
    assert choice.backend == "torch"
    assert choice.reason

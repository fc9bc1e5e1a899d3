"""One function for attention: what it gives does not depend on what it chooses, and it says what it chose."""

from itertools import pairwise

import jaxtyping
import pytest
import torch

from lightning_lm import kernels
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional import Documents, causal_attention
from lightning_lm.kernels.attention import attention
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig

IDS = torch.tensor([[0] * 30 + [1] * 60, [0] * 1 + [1] * 89])


def made(queries=90, size=16):
    shapes = [(2, 2, queries, size), (2, 1, 90, size), (2, 1, 90, size)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"window": 500, "scale": 0.3}, {"softcap": 3.0}], ids=str)
def test_packed_rows_and_windows_agree_with_what_models_call(backend, agree, packed, options):
    documents = Documents(ids=IDS, runs=()) if packed else None
    agree(
        lambda *inputs: attention(*inputs, mask=documents, **options),
        lambda *inputs: causal_attention(*inputs, mask=documents, **options),
        *made(),
    )


def test_no_mask_of_pairs_is_built_for_packed_rows(triton, monkeypatch):
    monkeypatch.setattr(Documents, "mask", lambda *_: pytest.fail("a mask of all pairs"))
    attention(*made(), mask=Documents(ids=IDS, runs=()), window=7)


def test_a_cache_goes_to_torch_and_the_report_says_why():
    inputs = made(queries=3)
    torch.testing.assert_close(attention(*inputs), causal_attention(*inputs), atol=0, rtol=0)
    (choice,) = (choice for choice in kernels.choices("cpu") if choice.operation == "attention")
    assert (choice.backend, "cpu" in choice.reason) == ("torch", True)


def model_with(*mixers):
    torch.manual_seed(0)
    layers = tuple(Layer(mixer=mixer, ffn=GLU()) for mixer in mixers)
    sizes = {"vocab_size": 50, "d_model": 32, "num_layers": len(layers), "context_length": 90}
    return TransformerConfig(layers=layers, **sizes).build()


MIXERS = (Attention(num_heads=2, num_kv_heads=1), Attention(num_heads=2, window=20, softcap=3.0))


@pytest.fixture
def off_the_cpu(monkeypatch):
    """Pack rows as on a GPU, where nothing is read back from the device; a mask of all pairs fails the test."""
    monkeypatch.setattr(Documents, "from_ids", lambda ids: Documents(ids=ids, runs=()))
    monkeypatch.setattr(Documents, "mask", lambda *_: pytest.fail("a mask of all pairs"))


def gradients(model, ids, documents):
    out = model(ids, document_ids=documents)
    return [out, *torch.autograd.grad(out.square().sum(), [*model.parameters()])]


def test_a_model_trains_on_packed_rows_without_a_mask_of_pairs(off_the_cpu, triton):
    model, ids = model_with(*MIXERS), torch.randint(50, IDS.shape)
    found = gradients(model, ids, IDS)
    chosen = {choice.operation: choice.backend for choice in kernels.choices()}
    assert chosen["attention"] == chosen["flash_attention"] == "triton"
    double, total = model.double(), []
    with kernels.force_backend("torch"):
        for row, cuts in enumerate(((0, 30, 90), (0, 1, 90))):  # each document by itself
            parts = [double(ids[row : row + 1, start:end]) for start, end in pairwise(cuts)]
            torch.testing.assert_close(found[0][row : row + 1].double(), torch.cat(parts, 1), atol=2e-5, rtol=0)
            loss = sum(part.square().sum() for part in parts)
            grads = torch.autograd.grad(loss, [*double.parameters()])
            total = grads if row == 0 else [a + b for a, b in zip(total, grads, strict=True)]
    for ours, exact in zip(found[1:], total, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-4 * exact.abs().max().item(), rtol=0)


def test_compiled_layers_make_the_same_choice(off_the_cpu, triton, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shape checks cannot be traced
    model, ids = model_with(*MIXERS), torch.randint(50, IDS.shape)
    plain = gradients(model, ids, IDS)
    torch._dynamo.reset()
    for layer in model.layers:
        layer.mixer.compile(backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(model, ids, IDS), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_boundaries_are_found_once_off_the_cpu():
    documents = Documents.from_ids(IDS.to("meta"))
    assert list(documents._first) == [None]
    assert documents.first_keys().shape == IDS.shape


def test_prompts_of_unequal_length_are_read_without_a_mask_of_pairs(off_the_cpu, triton):
    model, ids = model_with(Attention(num_heads=2)), torch.randint(50, (2, 9))
    cache = model.make_cache(2, 9, starts=torch.tensor([0, 4]))
    with torch.no_grad():
        padded = model(ids, cache=cache)
        alone = model(ids[1:, 4:])
    torch.testing.assert_close(padded[1:, 4:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("options", "reason"), [({"dropout": 0.1}, "dropout=0.1 of attention weights"), ({}, "")])
def test_the_report_says_what_packed_rows_of_a_model_take(capsys, triton, options, reason):
    model, ids = model_with(Attention(num_heads=2, **options)).train(), torch.randint(50, IDS.shape)
    if reason:
        with pytest.raises(ConfigurationError, match=reason):
            model(ids, document_ids=IDS)
    else:
        model(ids, document_ids=IDS)
    kernels.report("cpu")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("attention "))
    assert line.split(maxsplit=2)[1:] == (["torch", reason] if reason else ["triton", "-"])


def test_the_report_knows_operations_by_what_users_call(capsys):
    kernels.report("cpu")
    names = [line[:35].strip() for line in capsys.readouterr().out.splitlines()[1:]]
    called = {name.strip(" ,()") for line in names for name in line.replace("(", ",").split(",")}
    assert {"swiglu", "geglu", "symmetric_product", "relu_squared", "rms_norm", "attention"} <= called
    assert "gated_unit (swiglu, geglu)" in names

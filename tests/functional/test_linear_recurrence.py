"""The three forms of linear recurrences: equal in float64, exact at documents, finite at extreme decays."""

import pytest
import torch
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.linear_recurrence import (
    chunked_recurrence,
    linear_recurrence,
    number_documents,
    parallel_recurrence,
    stepwise_recurrence,
)

LENGTH, HEADS, KEY_DIM, VALUE_DIM = 37, 4, 5, 3
KINDS = ["linear", "decayed", "per feature", "delta", "gated delta", "gated delta per feature", "shared keys"]


def inputs(kind: str, batch: int = 2, length: int = LENGTH) -> tuple[list[Tensor | None], dict[str, Tensor | None]]:
    generator = torch.Generator().manual_seed(len(kind))

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, length, *shape, generator=generator, dtype=torch.float64)

    key_heads = 2 if kind == "shared keys" else HEADS
    q, k, v = draw(key_heads, KEY_DIM), draw(key_heads, KEY_DIM), draw(HEADS, VALUE_DIM)
    k = k / k.norm(dim=-1, keepdim=True)
    decay = None if kind in ("linear", "delta") else -draw(HEADS).abs()
    if "per feature" in kind:
        decay = -draw(HEADS, KEY_DIM).abs()
    beta = draw(HEADS).sigmoid() if "delta" in kind or kind == "shared keys" else None
    return [q, k, v, decay], {"beta": beta}


def by_hand(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> Tensor:
    """One document, one loop over everything."""
    batch, length, heads, value_dim = v.shape
    out = torch.zeros_like(v)
    for row in range(batch):
        for head in range(heads):
            key_head = head * k.shape[2] // heads
            state = torch.zeros(k.shape[3], value_dim, dtype=v.dtype)
            for t in range(length):
                key, query = k[row, t, key_head], q[row, t, key_head]
                if log_decay is not None:
                    state = torch.diag(log_decay[row, t, head].exp().expand(k.shape[3])) @ state
                write = v[row, t, head]
                if beta is not None:
                    write = beta[row, t, head] * (write - key @ state)
                state = state + torch.outer(key, write)
                out[row, t, head] = query @ state
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_forms_are_equal(kind: str) -> None:
    arguments, options = inputs(kind)
    wanted = by_hand(*arguments, **options)  # type: ignore[arg-type]
    stepped, state = stepwise_recurrence(*arguments, **options)
    torch.testing.assert_close(stepped, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(parallel_recurrence(*arguments, **options), wanted, rtol=0, atol=1e-9)
    for chunk_size in (None, 1, 8, 64):
        chunked, after = chunked_recurrence(*arguments, **options, chunk_size=chunk_size)
        torch.testing.assert_close(chunked, wanted, rtol=0, atol=1e-9)
        torch.testing.assert_close(after, state, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_those_alone(kind: str) -> None:
    """Lengths of one token, of a whole chunk, across chunks; the ids come back, as those of a caller may."""
    arguments, options = inputs(kind, batch=1)
    lengths = [1, 8, 3, 1, 16, 8]
    ids = torch.arange(2).repeat(3).repeat_interleave(torch.tensor(lengths))[None]

    def piece(x: Tensor | None, begin: int, end: int) -> Tensor | None:
        return None if x is None else x[:, begin:end]

    alone, begin = [], 0
    for length in lengths:
        part = [piece(x, begin, begin + length) for x in arguments]
        alone.append(by_hand(*part, beta=piece(options["beta"], begin, begin + length)))  # type: ignore[arg-type]
        begin += length
    wanted = torch.cat(alone, 1)
    last, state = stepwise_recurrence(*part, beta=piece(options["beta"], begin - length, begin))  # type: ignore[arg-type]
    assert last.shape[1] == lengths[-1]
    for run in (stepwise_recurrence, lambda *a, **k: chunked_recurrence(*a, **k, chunk_size=8)):
        packed, after = run(*arguments, **options, document_ids=ids)
        torch.testing.assert_close(packed, wanted, rtol=0, atol=1e-9)
        torch.testing.assert_close(after, state, rtol=0, atol=1e-9)
    packed = parallel_recurrence(*arguments, **options, document_ids=ids)
    torch.testing.assert_close(packed, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_handed_on(kind: str) -> None:
    arguments, options = inputs(kind)
    whole, end = linear_recurrence(*arguments, **options)
    state, parts = None, []
    for begin, stop in ((0, 20), (20, 21), (21, LENGTH)):
        part = [None if x is None else x[:, begin:stop] for x in arguments]
        beta = None if options["beta"] is None else options["beta"][:, begin:stop]
        out, state = linear_recurrence(*part, beta=beta, state=state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["decayed", "per feature", "gated delta"])
def test_gradients_and_extreme_decays(kind: str) -> None:
    """Decays of e^-80 a token, and one of 1, in float32: all finite, and the gradients are those of the definition."""
    arguments, options = inputs(kind)
    arguments[3] = torch.where(torch.arange(LENGTH)[:, None] % 3 == 0, -80.0, 0.0).expand(2, LENGTH, HEADS).double()
    if kind == "per feature":
        arguments[3] = arguments[3][..., None].expand(-1, -1, -1, KEY_DIM)
    ids = torch.arange(LENGTH).div(10, rounding_mode="floor").expand(2, -1)
    found = []
    for run, dtype in ((stepwise_recurrence, torch.float64), (chunked_recurrence, torch.float32)):
        leaves = [x.to(dtype).clone().requires_grad_() for x in (*arguments, options["beta"]) if x is not None]
        *first, beta = leaves if options["beta"] is not None else [*leaves, None]
        out, state = run(*first, beta=beta, document_ids=ids)
        (out.square().sum() + state.sum()).backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    for right, got in zip(*found, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


def test_half_precision_keeps_a_wide_state() -> None:
    arguments, options = inputs("gated delta")
    narrow = [x.bfloat16() for x in arguments if x is not None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = chunked_recurrence(*narrow, beta=options["beta"])
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    wide = [x.double() for x in narrow]
    _, right = stepwise_recurrence(*wide, beta=options["beta"])
    torch.testing.assert_close(state.double(), right, rtol=0, atol=1e-5)


def test_numbers_of_documents() -> None:
    assert number_documents(torch.tensor([[7, 7, 3, 7, 7]])).tolist() == [[0, 0, 1, 2, 2]]


def test_heads_that_do_not_divide() -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ConfigurationError, match="multiple"):
        chunked_recurrence(q, q, torch.zeros(1, 2, 4, 4))

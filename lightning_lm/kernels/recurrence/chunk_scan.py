"""The state of a linear recurrence on its way through the chunks: one launch instead of several products per chunk.

`functional.linear_recurrence.chunked_recurrence` does all that concerns a single chunk as batched products, and what is
left is short and sequential: with the values ``v``, keys ``k``, removed keys ``w`` and factor ``a`` of each chunk,
``u = v - w S``, then ``S`` becomes ``diag(a) S + k' u``. A program holds some columns of the state of one head in
registers and walks through the chunks; the backward pass walks back in the same way. The gradients of keys and factors
are products over all chunks at once. Nothing is summed by atomics: a run can be repeated bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_lm.kernels.runtime.backend import use_triton
from lightning_lm.kernels.runtime.launch import jit, launch, next_power_of_two
from lightning_lm.kernels.runtime.launch_settings import settings
from lightning_lm.kernels.runtime.operation import Operation

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["scan_chunks", "supported"]

_LARGEST_KEY, _LARGEST_CHUNK = 128, 64
"""Features of a key and tokens of a chunk whose tiles stay in registers: twice as many spill."""


def scan_chunks(
    values: Tensor, removed: Tensor | None, keys: Tensor, keep: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state before each chunk, the values that each chunk writes, and the state after the last.

    Args:
        values: Values to write, [batch, heads, chunks, size, value_dim].
        removed: Keys whose values in the state are taken off, [batch, heads, chunks, size, key_dim]; ``None`` for none.
        keys: Keys to write by, like ``removed``.
        keep: Factor on the state, [batch, 1 or heads, chunks, 1 or key_dim, 1]; ``None`` for one.
        state: State before the first chunk, [batch, heads, key_dim, value_dim].

    Source:
        Yang et al. 2024, arXiv:2406.06484, section 3.2.
    """
    factors = keys.new_ones(()) if keep is None else keep[..., 0].to(keys.dtype)
    factors = factors.expand(*keys.shape[:3], keys.size(-1))
    return cast(tuple[Tensor, Tensor, Tensor], _operation(values, removed, keys, factors, state))


def supported(values: Tensor, keys: Tensor) -> str | None:
    """Return why the kernels do not take chunks, or nothing if they do.

    Args:
        values: [batch, heads, chunks, size, value_dim].
        keys: [batch, heads, chunks, size, key_dim].
    """
    if keys.size(-1) > _LARGEST_KEY:
        return f"keys of {keys.size(-1)} features are above {_LARGEST_KEY}"
    if keys.size(-2) > _LARGEST_CHUNK:
        return f"chunks of {keys.size(-2)} tokens are above {_LARGEST_CHUNK}"
    return None if values.dtype == torch.float32 else f"{values.dtype} is not float32"


@jit
def _forward_kernel(
    values_ptr, removed_ptr, keys_ptr, keep_ptr, state_ptr, states_ptr, new_ptr, last_ptr,
    chunks, size, key_dim, value_dim,
    SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, REMOVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    tokens, features = tl.arange(0, SIZE)[:, None], tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    of_state = features[:, None] * value_dim + columns
    in_state = (features[:, None] < key_dim) & (columns < value_dim)
    of_keys, in_keys = tokens * key_dim + features[None, :], (tokens < size) & (features[None, :] < key_dim)
    of_values, in_values = tokens * value_dim + columns, (tokens < size) & (columns < value_dim)
    state = tl.load(state_ptr + head * key_dim * value_dim + of_state, mask=in_state, other=0.0)
    for step in range(0, chunks):
        chunk = head * chunks + step
        tl.store(states_ptr + chunk * key_dim * value_dim + of_state, state, mask=in_state)
        value = tl.load(values_ptr + chunk * size * value_dim + of_values, mask=in_values, other=0.0)
        if REMOVED:
            key = tl.load(removed_ptr + chunk * size * key_dim + of_keys, mask=in_keys, other=0.0)
            value -= tl.dot(key, state, input_precision=PRECISION)
        tl.store(new_ptr + chunk * size * value_dim + of_values, value, mask=in_values)
        key = tl.load(keys_ptr + chunk * size * key_dim + of_keys, mask=in_keys, other=0.0)
        keep = tl.load(keep_ptr + chunk * key_dim + features, mask=features < key_dim, other=0.0)
        state = tl.dot(tl.trans(key), value, keep[:, None] * state, input_precision=PRECISION)
    tl.store(last_ptr + head * key_dim * value_dim + of_state, state, mask=in_state)


@jit
def _backward_kernel(
    grad_states_ptr, grad_new_ptr, grad_last_ptr, removed_ptr, keys_ptr, keep_ptr, after_ptr, grad_values_ptr,
    grad_state_ptr, chunks, size, key_dim, value_dim,
    SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, REMOVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    tokens, features = tl.arange(0, SIZE)[:, None], tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    of_state = features[:, None] * value_dim + columns
    in_state = (features[:, None] < key_dim) & (columns < value_dim)
    of_keys, in_keys = tokens * key_dim + features[None, :], (tokens < size) & (features[None, :] < key_dim)
    of_values, in_values = tokens * value_dim + columns, (tokens < size) & (columns < value_dim)
    grad = tl.load(grad_last_ptr + head * key_dim * value_dim + of_state, mask=in_state, other=0.0)
    for step in range(0, chunks):
        chunk = head * chunks + chunks - 1 - step
        tl.store(after_ptr + chunk * key_dim * value_dim + of_state, grad, mask=in_state)
        value = tl.load(grad_new_ptr + chunk * size * value_dim + of_values, mask=in_values, other=0.0)
        key = tl.load(keys_ptr + chunk * size * key_dim + of_keys, mask=in_keys, other=0.0)
        value = tl.dot(key, grad, value, input_precision=PRECISION)
        tl.store(grad_values_ptr + chunk * size * value_dim + of_values, value, mask=in_values)
        keep = tl.load(keep_ptr + chunk * key_dim + features, mask=features < key_dim, other=0.0)
        grad = keep[:, None] * grad
        grad += tl.load(grad_states_ptr + chunk * key_dim * value_dim + of_state, mask=in_state, other=0.0)
        if REMOVED:
            key = tl.load(removed_ptr + chunk * size * key_dim + of_keys, mask=in_keys, other=0.0)
            grad -= tl.dot(tl.trans(key), value, input_precision=PRECISION)
    tl.store(grad_state_ptr + head * key_dim * value_dim + of_state, grad, mask=in_state)


def _chunk_scan_forward(
    values: Tensor, removed: Tensor | None, keys: Tensor, keep: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    states = state.new_empty(*keys.shape[:3], *state.shape[2:])
    new, last = torch.empty_like(values, memory_format=torch.contiguous_format), state.new_empty(state.shape)
    if use_triton("linear_recurrence", keys.device, supported(values, keys)):
        _launch(_forward_kernel, (values, removed, keys, keep, state), (states, new, last), keys, values)
        return states, new, last
    for index in range(keys.size(2)):
        states[:, :, index] = state
        value = values[:, :, index]
        new[:, :, index] = value = value if removed is None else value - removed[:, :, index] @ state
        state = keep[:, :, index, :, None] * state + keys[:, :, index].mT @ value
    return states, new, last.copy_(state)


def _chunk_scan_backward(
    grad_states: Tensor, grad_new: Tensor, grad_last: Tensor,
    removed: Tensor | None, keys: Tensor, keep: Tensor, states: Tensor, new: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    after, grad_values, grad_state = (x.new_empty(x.shape) for x in (states, new, grad_last))
    if use_triton("linear_recurrence", keys.device, supported(new, keys)):
        given = grad_states, grad_new, grad_last, removed, keys, keep
        _launch(_backward_kernel, given, (after, grad_values, grad_state), keys, new)
    else:
        grad = grad_last
        for index in reversed(range(keys.size(2))):
            after[:, :, index] = grad
            grad_values[:, :, index] = value = grad_new[:, :, index] + keys[:, :, index] @ grad
            grad = keep[:, :, index, :, None] * grad + grad_states[:, :, index]
            grad = grad if removed is None else grad - removed[:, :, index].mT @ value
        grad_state.copy_(grad)
    grad_removed = keys.new_empty(0) if removed is None else -(grad_values @ states.mT)
    return grad_values, grad_removed, new @ after.mT, (after * states).sum(-1), grad_state


def _launch(
    kernel: Any, given: tuple[Tensor | None, ...], results: tuple[Tensor, ...], keys: Tensor, new: Tensor
) -> None:
    batch, heads, chunks, size, key_dim = keys.shape
    removed = given[-4] if kernel is _forward_kernel else given[-3]
    inputs = ((keys if x is None else x).contiguous() for x in given)
    chosen = _tiles(keys, new)
    launch(
        kernel, (batch * heads, -(-new.size(-1) // chosen["BLOCK_V"])),
        *inputs, *results, chunks, size, key_dim, new.size(-1), REMOVED=removed is not None, **chosen,
    )  # fmt: skip


def _tiles(keys: Tensor, values: Tensor) -> dict[str, Any]:
    """Return the tile of a program: all features of keys by as many columns of values as registers hold."""
    block_k = max(next_power_of_two(keys.size(-1)), 16)
    block_v = min(max(next_power_of_two(values.size(-1)), 16), 32)
    default = {"BLOCK_V": block_v, "num_warps": 4 if block_k <= 64 else 8, "num_stages": 1}
    sizes = keys.size(-1), values.size(-1)
    chosen = settings("linear_recurrence", sizes, keys.dtype, device=keys.device, default=default)
    # Three products of tensor cores are as exact as float32 to a bit or two; the units of float32 would spill.
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    size = max(next_power_of_two(keys.size(-2)), 16)
    return {**chosen, "SIZE": size, "BLOCK_K": block_k, "PRECISION": precision}


def _fake_forward(
    values: Tensor, removed: Tensor | None, keys: Tensor, keep: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    states = state.new_empty(*keys.shape[:3], *state.shape[2:])
    return states, values.new_empty(values.shape), state.new_empty(state.shape)


def _fake_backward(
    grad_states: Tensor, grad_new: Tensor, grad_last: Tensor,
    removed: Tensor | None, keys: Tensor, keep: Tensor, states: Tensor, new: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    of_removed = keys.new_empty(0 if removed is None else keys.shape)
    of_values, of_state = new.new_empty(new.shape), grad_last.new_empty(grad_last.shape)
    return of_values, of_removed, keys.new_empty(keys.shape), keep.new_empty(keep.shape), of_state


_operation = Operation(
    _chunk_scan_forward,
    _chunk_scan_backward,
    schema="(Tensor values, Tensor? removed, Tensor keys, Tensor keep, Tensor state) -> (Tensor, Tensor, Tensor)",
    backward_schema="(Tensor grad_states, Tensor grad_new, Tensor grad_last, Tensor? removed, Tensor keys, "
    "Tensor keep, Tensor states, Tensor new) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fakes=(_fake_forward, _fake_backward),
    saved=lambda tensors, results: (*tensors[1:4], *results[:2]),
    visible=3,
)

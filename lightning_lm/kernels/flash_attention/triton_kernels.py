"""The Triton kernels of `flash_attention`: forward, gradients of queries, gradients of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_lm.kernels.runtime.launch import jit

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["forward_kernel", "key_kernel", "query_kernel"]


@jit
def _weights_of(scores, factor, cap, SOFTCAP: tl.constexpr):
    """Scale products, and squeeze them: scores in base 2, and the squeezed ratio that their slope needs."""
    ratio = scores * factor
    if SOFTCAP:
        ratio = 1.0 - 2.0 / (1.0 + tl.exp2(ratio * 2.8853900817779268))  # tanh
        return ratio * cap, ratio
    return ratio, ratio


@jit
def _rows_of(x_ptr, rows, stride, limit, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Load a tile of rows; those past the limit are zeros, if any may be there."""
    d = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < limit) & (d[None, :] < SIZE) if MASKED else d[None, :] < SIZE
    return tl.load(x_ptr + rows[:, None] * stride + d[None, :], mask=inside, other=0.0)


@jit
def _attend(
    q, k_ptr, v_ptr, begin, end, column, largest, total, weighted, k_row, v_row, keys, factor, cap,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = column + tl.arange(0, BLOCK_K)
    k = _rows_of(k_ptr, columns, k_row, keys, SIZE, BLOCK_D, MASKED)
    v = _rows_of(v_ptr, columns, v_row, keys, SIZE, BLOCK_D, MASKED)
    scores, _ = _weights_of(tl.dot(q, tl.trans(k), input_precision=PRECISION), factor, cap, SOFTCAP)
    if MASKED:
        seen = (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(largest, tl.max(scores, axis=1))
    pivot = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
    weights = tl.exp2(scores - pivot[:, None])
    shrink = tl.exp2(largest - pivot)
    total = total * shrink + tl.sum(weights, axis=1)
    weighted = tl.dot(weights.to(v.dtype), v, weighted * shrink[:, None], input_precision=PRECISION)
    return highest, total, weighted


@jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, lse_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, first_batch, heads, queries, keys, factor, cap,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    FIRST: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Attend from a tile of queries of one head."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q  # the longest first
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    k_ptr += batch * k_batch + head // GROUP * k_head
    v_ptr += batch * v_batch + head // GROUP * v_head
    rows, d = start + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < queries) & (d[None, :] < SIZE)
    q = _rows_of(q_ptr + batch * q_batch + head * q_head, rows, q_row, queries, SIZE, BLOCK_D, True)
    end = rows + (keys - queries + 1)
    begin = end * 0
    whole_to = (start + keys - queries + 1) // BLOCK_K * BLOCK_K
    low, whole_from = 0, 0
    if FIRST:
        begin = tl.load(first_ptr + batch * first_batch + tl.minimum(rows, queries - 1)).to(tl.int32)
        low = tl.min(begin, axis=0) // BLOCK_K * BLOCK_K
        whole_from = (tl.max(begin, axis=0) + BLOCK_K - 1) // BLOCK_K * BLOCK_K
        whole_from = tl.minimum(whole_from, tl.maximum(whole_to, low))
    high = tl.minimum(start + BLOCK_Q + keys - queries, keys)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    weighted = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for column in range(whole_from, whole_to, BLOCK_K):
        largest, total, weighted = _attend(
            q, k_ptr, v_ptr, begin, end, column, largest, total, weighted, k_row, v_row, keys, factor, cap,
            SIZE, BLOCK_D, BLOCK_K, SOFTCAP, False, PRECISION,
        )  # fmt: skip
    left, right = (whole_from - low) // BLOCK_K, tl.maximum(whole_from, whole_to)
    for tile in range(left + (high - right + BLOCK_K - 1) // BLOCK_K):
        column = tl.where(tile < left, low + tile * BLOCK_K, right + (tile - left) * BLOCK_K)
        largest, total, weighted = _attend(
            q, k_ptr, v_ptr, begin, end, column, largest, total, weighted, k_row, v_row, keys, factor, cap,
            SIZE, BLOCK_D, BLOCK_K, SOFTCAP, True, PRECISION,
        )  # fmt: skip
    out = weighted / tl.where(total > 0, total, 1.0)[:, None]
    place = ((batch * queries + rows) * heads + head)[:, None] * SIZE + d[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(total > 0, (largest + tl.log2(total)) * 0.6931471805599453, float("inf"))
    tl.store(lse_ptr + (batch * heads + head) * queries + rows, lse, mask=rows < queries)


@jit
def _query_gradient(
    q, grad, lse, along, k_ptr, v_ptr, begin, end, column, grad_q, k_row, v_row, keys, factor, cap,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = column + tl.arange(0, BLOCK_K)
    k = _rows_of(k_ptr, columns, k_row, keys, SIZE, BLOCK_D, MASKED)
    v = _rows_of(v_ptr, columns, v_row, keys, SIZE, BLOCK_D, MASKED)
    scores, ratio = _weights_of(tl.dot(q, tl.trans(k), input_precision=PRECISION), factor, cap, SOFTCAP)
    weights = tl.exp2(scores - lse[:, None])
    if MASKED:
        seen = (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
        weights = tl.where(seen, weights, 0.0)
    grad_scores = weights * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - along[:, None])
    if SOFTCAP:
        grad_scores = grad_scores * (1.0 - ratio * ratio)
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)


@jit
def query_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, grad_ptr, lse_ptr, along_ptr, grad_q_ptr, q_batch, q_head, q_row,
    k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row, first_batch,
    heads, queries, keys, scale, factor, cap,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    FIRST: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Sum the gradient of a tile of queries, and the product of output and gradient that `key_kernel` needs."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    k_ptr += batch * k_batch + head // GROUP * k_head
    v_ptr += batch * v_batch + head // GROUP * v_head
    rows, d = start + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < queries) & (d[None, :] < SIZE)
    q = _rows_of(q_ptr + batch * q_batch + head * q_head, rows, q_row, queries, SIZE, BLOCK_D, True)
    grad_ptr += batch * grad_batch + head * grad_head
    grad = _rows_of(grad_ptr, rows, grad_row, queries, SIZE, BLOCK_D, True)
    place = ((batch * queries + rows) * heads + head)[:, None] * SIZE + d[None, :]
    out = tl.load(out_ptr + place, mask=inside, other=0.0)
    along = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    number = (batch * heads + head) * queries + rows
    tl.store(along_ptr + number, along, mask=rows < queries)
    lse = tl.load(lse_ptr + number, mask=rows < queries, other=float("inf")) * 1.4426950408889634
    end = rows + (keys - queries + 1)
    begin = end * 0
    whole_to = (start + keys - queries + 1) // BLOCK_K * BLOCK_K
    low, whole_from = 0, 0
    if FIRST:
        begin = tl.load(first_ptr + batch * first_batch + tl.minimum(rows, queries - 1)).to(tl.int32)
        low = tl.min(begin, axis=0) // BLOCK_K * BLOCK_K
        whole_from = (tl.max(begin, axis=0) + BLOCK_K - 1) // BLOCK_K * BLOCK_K
        whole_from = tl.minimum(whole_from, tl.maximum(whole_to, low))
    high = tl.minimum(start + BLOCK_Q + keys - queries, keys)
    grad_q = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for column in range(whole_from, whole_to, BLOCK_K):
        grad_q = _query_gradient(
            q, grad, lse, along, k_ptr, v_ptr, begin, end, column, grad_q, k_row, v_row, keys, factor, cap,
            SIZE, BLOCK_D, BLOCK_K, SOFTCAP, False, PRECISION,
        )  # fmt: skip
    left, right = (whole_from - low) // BLOCK_K, tl.maximum(whole_from, whole_to)
    for tile in range(left + (high - right + BLOCK_K - 1) // BLOCK_K):
        column = tl.where(tile < left, low + tile * BLOCK_K, right + (tile - left) * BLOCK_K)
        grad_q = _query_gradient(
            q, grad, lse, along, k_ptr, v_ptr, begin, end, column, grad_q, k_row, v_row, keys, factor, cap,
            SIZE, BLOCK_D, BLOCK_K, SOFTCAP, True, PRECISION,
        )  # fmt: skip
    tl.store(grad_q_ptr + place, (grad_q * scale).to(grad_q_ptr.dtype.element_ty), mask=inside)


@jit
def _key_gradient(
    k, v, q_ptr, grad_ptr, lse_ptr, along_ptr, first_ptr, row, columns, grad_k, grad_v, q_row, grad_row, queries,
    offset, factor, cap,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    FIRST: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = row + tl.arange(0, BLOCK_Q)
    q = _rows_of(q_ptr, rows, q_row, queries, SIZE, BLOCK_D, True)
    grad = _rows_of(grad_ptr, rows, grad_row, queries, SIZE, BLOCK_D, True)
    lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf")) * 1.4426950408889634
    along = tl.load(along_ptr + rows, mask=rows < queries, other=0.0)
    scores, ratio = _weights_of(tl.dot(k, tl.trans(q), input_precision=PRECISION), factor, cap, SOFTCAP)
    weights = tl.exp2(scores - lse[None, :])
    seen = columns[:, None] <= rows[None, :] + offset
    if FIRST:
        begin = tl.load(first_ptr + rows, mask=rows < queries, other=0).to(tl.int32)
        seen = seen & (columns[:, None] >= begin[None, :])
    weights = tl.where(seen, weights, 0.0)
    grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    grad_scores = weights * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - along[None, :])
    if SOFTCAP:
        grad_scores = grad_scores * (1.0 - ratio * ratio)
    return tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION), grad_v


@jit
def key_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, grad_ptr, lse_ptr, along_ptr, grad_k_ptr, grad_v_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    first_batch, last_batch, kv_heads, queries, keys, scale, factor, cap,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    FIRST: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Sum over all queries that see a tile of keys, of one head after the other."""
    start = tl.program_id(0) * BLOCK_K  # the first keys are seen by most queries
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    columns, d = start + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    inside = (columns[:, None] < keys) & (d[None, :] < SIZE)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    k = _rows_of(k_ptr, columns, k_row, keys, SIZE, BLOCK_D, True)
    v = _rows_of(v_ptr, columns, v_row, keys, SIZE, BLOCK_D, True)
    offset = keys - queries
    low = tl.maximum(start - offset, 0) // BLOCK_Q * BLOCK_Q
    high = queries
    if FIRST:
        high = tl.load(last_ptr + batch * last_batch + tl.minimum(start + BLOCK_K, keys) - 1)
    first_ptr += batch * first_batch
    grad_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_head_ptr = q_ptr + batch * q_batch + head * q_head
        grad_head_ptr = grad_ptr + batch * grad_batch + head * grad_head
        number = (batch * kv_heads * GROUP + head) * queries
        for row in range(low, high, BLOCK_Q):
            grad_k, grad_v = _key_gradient(
                k, v, q_head_ptr, grad_head_ptr, lse_ptr + number, along_ptr + number, first_ptr, row, columns,
                grad_k, grad_v, q_row, grad_row, queries, offset, factor, cap,
                SIZE, BLOCK_D, BLOCK_Q, FIRST, SOFTCAP, PRECISION,
            )  # fmt: skip
    place = ((batch * keys + columns) * kv_heads + kv_head)[:, None] * SIZE + d[None, :]
    tl.store(grad_k_ptr + place, (grad_k * scale).to(grad_k_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_v_ptr + place, grad_v.to(grad_v_ptr.dtype.element_ty), mask=inside)

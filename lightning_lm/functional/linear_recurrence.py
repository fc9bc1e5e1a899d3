"""Linear recurrences over a matrix-valued state: linear attention, state spaces (SSD) and the gated delta rule.

Each head carries a matrix ``S`` from token to token, ``S_t = diag(a_t) S_{t-1} + k_t u_t'``, and reads it by its query,
``o_t = S_t' q_t``. Linear attention writes values, ``u = v``; the delta rule writes what the memory gets wrong,
``u_t = beta_t (v_t - (diag(a_t) S_{t-1})' k_t)``. The same numbers come in three forms:

* `stepwise_recurrence` is the definition, token after token; decoding takes it.
* `parallel_recurrence` is attention without the softmax: all pairs of tokens at once, in quadratic time.
* `chunked_recurrence` takes pairs inside chunks and the state from chunk to chunk: linear time, matmuls throughout.

All three reset the state at the documents of packed rows, and reduce in float32 or better, also under autocast.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_lm.errors import ConfigurationError

__all__ = [
    "Scan",
    "chunked_recurrence",
    "linear_recurrence",
    "number_documents",
    "parallel_recurrence",
    "stepwise_recurrence",
]

_CHUNK, _CHUNK_ON_CPU, _CHUNK_OF_VECTORS = 64, 32, 16
"""Tokens of a chunk with one decay per head, and with one per key feature, which takes a tensor of all pairs."""


Function = TypeVar("Function", bound=Callable[..., Any])


def _full_precision(function: Function) -> Function:
    """Let a function whose first argument is a tensor compute in the types it is given, also under autocast."""

    @functools.wraps(function)
    def run(q: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *arguments, **options)

    return cast(Function, run)


def number_documents(document_ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Return ids that differ in all documents of a row, 0, 1, ...: the given ones need only differ in neighbours.

    Args:
        document_ids: Equal inside a document, different in neighbouring ones.
    """
    changes = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
    return changes.cumsum(1)


@_full_precision
def linear_recurrence(
    q: Float[Tensor, "batch seq key_heads key_dim"],
    k: Float[Tensor, "batch seq key_heads key_dim"],
    v: Float[Tensor, "batch seq heads value_dim"],
    log_decay: Float[Tensor, "batch seq heads *key_dim"] | None = None,
    *,
    beta: Float[Tensor, "batch seq heads"] | None = None,
    document_ids: Int[Tensor, "batch seq"] | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
    scan: "Scan | None" = None,
) -> tuple[Float[Tensor, "batch seq heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """Run the recurrence by the fastest of its forms; see `chunked_recurrence` for the arguments.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        log_decay: Natural logarithm of the decay of each token.
        beta: Writing strength of the delta rule; ``None`` for plain linear attention.
        document_ids: Documents of packed rows; ``None`` if each row is one.
        state: Memory before the first token.
        scan: Kernel that passes the state from chunk to chunk; ``None`` for a loop.
    """
    if scan is None or q.size(1) == 1:
        run = stepwise_recurrence if q.size(1) == 1 else chunked_recurrence
        return run(q, k, v, log_decay, beta=beta, document_ids=document_ids, state=state)
    given = _prepare(q, k, v, log_decay, beta, state)
    mixed, state = _in_chunks(given, document_ids, _usual_chunk(q, log_decay), scan)
    return mixed.to(v.dtype), state


@_full_precision
def stepwise_recurrence(
    q: Float[Tensor, "batch seq key_heads key_dim"],
    k: Float[Tensor, "batch seq key_heads key_dim"],
    v: Float[Tensor, "batch seq heads value_dim"],
    log_decay: Float[Tensor, "batch seq heads *key_dim"] | None = None,
    *,
    beta: Float[Tensor, "batch seq heads"] | None = None,
    document_ids: Int[Tensor, "batch seq"] | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
) -> tuple[Float[Tensor, "batch seq heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """Run the recurrence as it is defined, token after token; see `chunked_recurrence` for the arguments.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        log_decay: Natural logarithm of the decay of each token.
        beta: Writing strength of the delta rule; ``None`` for plain linear attention.
        document_ids: Documents of packed rows; ``None`` if each row is one.
        state: Memory before the first token.
    """
    given = _prepare(q, k, v, log_decay, beta, state)
    groups = given.v.size(2) // given.k.size(2)
    keys, queries = (x.repeat_interleave(groups, 2).unbind(1) for x in (given.k, given.q))
    continues = None
    if document_ids is not None:
        continues = F.pad(document_ids[:, 1:] == document_ids[:, :-1], (1, 0), value=True).unbind(1)
    state, outputs = given.state, []
    for t, (query, key, value) in enumerate(zip(queries, keys, given.v.unbind(1), strict=True)):
        if continues is not None:
            state = state.masked_fill(~continues[t][:, None, None, None], 0)
        if given.log_decay is not None:
            state = state * given.log_decay[:, t].exp()[..., None]
        if given.beta is not None:
            value = given.beta[:, t] * (value - torch.einsum("bhkv,bhk->bhv", state, key))
        state = state + key[..., None] * value[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query))
    return torch.stack(outputs, 1).to(v.dtype), state


@_full_precision
def parallel_recurrence(
    q: Float[Tensor, "batch seq key_heads key_dim"],
    k: Float[Tensor, "batch seq key_heads key_dim"],
    v: Float[Tensor, "batch seq heads value_dim"],
    log_decay: Float[Tensor, "batch seq heads *key_dim"] | None = None,
    *,
    beta: Float[Tensor, "batch seq heads"] | None = None,
    document_ids: Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq heads value_dim"]:
    """Run the recurrence from an empty state as a masked product of all pairs of tokens, in quadratic time and memory.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        log_decay: Natural logarithm of the decay of each token.
        beta: Writing strength of the delta rule; ``None`` for plain linear attention.
        document_ids: Documents of packed rows; ``None`` if each row is one.

    Source:
        Retention: Sun et al. 2023, arXiv:2307.08621, equation 5; the delta rule: Yang et al. 2024, arXiv:2406.06484,
        section 3.
    """
    given = _prepare(q, k, v, log_decay, beta, None)
    queries, keys, values = (x.transpose(1, 2) for x in (given.q, given.k, given.v))
    seen = torch.ones(q.size(1), q.size(1), dtype=torch.bool, device=q.device).tril()
    if document_ids is not None:
        numbers = number_documents(document_ids)
        seen = (seen & (numbers[:, :, None] == numbers[:, None, :]))[:, None]
    cumulative = None if given.log_decay is None else given.log_decay.cumsum(1).transpose(1, 2)
    pairs = _pairs(cumulative, seen, groups=values.size(1) // keys.size(1))
    if given.beta is not None:
        values = _solve(pairs(keys, keys), given.beta.transpose(1, 2), values)
    return (pairs(queries, keys) @ values).transpose(1, 2).to(v.dtype)


@_full_precision
def chunked_recurrence(
    q: Float[Tensor, "batch seq key_heads key_dim"],
    k: Float[Tensor, "batch seq key_heads key_dim"],
    v: Float[Tensor, "batch seq heads value_dim"],
    log_decay: Float[Tensor, "batch seq heads *key_dim"] | None = None,
    *,
    beta: Float[Tensor, "batch seq heads"] | None = None,
    document_ids: Int[Tensor, "batch seq"] | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "batch seq heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """Run the recurrence in time linear in the length: pairs of tokens inside chunks, the state between them.

    Decays are masked before they are exponentiated: their logarithms may be as low as they like, and a document does
    not begin with an infinite one, whose differences would be NaN.

    Args:
        q: Queries. Neighbouring heads of values share a head of queries and keys if there are fewer of these.
        k: Keys.
        v: Values.
        log_decay: Natural logarithm of the decay before each token is written, at most 0: one per head, or one for each
            key feature. ``None`` for no decay.
        beta: Writing strength of the delta rule, whose keys should have length one; ``None`` for linear attention.
        document_ids: Equal inside a document; the state starts at zero in each. ``None`` if each row is one.
        state: Memory of the first token's document before it; ``None`` for an empty one.
        chunk_size: Tokens of a chunk; ``None`` for a fast one.

    Returns:
        The outputs, and the state after the last token, in float32 or better.

    Source:
        Linear attention: Katharopoulos et al. 2020, arXiv:2006.16236; SSD: Dao and Gu 2024, arXiv:2405.21060, section
        6; decays per feature: Yang et al. 2023, arXiv:2312.06635; delta rule: Yang et al. 2024, arXiv:2406.06484, and
        arXiv:2412.06464 with decays.
    """
    given = _prepare(q, k, v, log_decay, beta, state)
    mixed, state = _in_chunks(given, document_ids, chunk_size or _usual_chunk(q, log_decay), None)
    return mixed.to(v.dtype), state


def _usual_chunk(q: Tensor, log_decay: Tensor | None) -> int:
    if log_decay is not None and log_decay.dim() == 4:
        return _CHUNK_OF_VECTORS
    return _CHUNK_ON_CPU if q.device.type == "cpu" else _CHUNK


def _in_chunks(given: "_Given", document_ids: Tensor | None, size: int, scan: "Scan | None") -> tuple[Tensor, Tensor]:
    """Return the outputs in float32 or better, and the state after the last token."""
    length, groups = given.q.size(1), given.v.size(2) // given.k.size(2)
    size = min(size, length)
    padding = -length % size

    def cut(x: Tensor) -> Tensor:  # [batch, seq, heads, dim] -> [batch, heads, chunks, size, dim]
        return cast(Tensor, F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, size)).movedim(3, 1))

    queries, keys, values = cut(given.q), cut(given.k), cut(given.v)
    edges = _document_edges(document_ids, size, padding)
    cumulative = None if given.log_decay is None else cut(given.log_decay).cumsum(3)
    seen = torch.ones(size, size, dtype=torch.bool, device=given.q.device).tril()
    pairs = _pairs(cumulative, seen if edges is None else seen & edges.together, groups)
    into, out, keep = _boundaries(cumulative, edges)
    scores = pairs(queries, keys)
    queries, wide_keys = (x.repeat_interleave(groups, 1) for x in (queries, keys))
    removed: Tensor | None = None
    if given.beta is not None:
        targets = torch.cat((values, into(wide_keys)), -1)
        solved = _solve(pairs(keys, keys), cut(given.beta), targets)
        values, removed = solved.split((given.v.size(-1), given.k.size(-1)), -1)
    reads, writes = into(queries), out(wide_keys)
    if scan is None:
        outputs, state = _loop(reads, scores, _Chunks(values, removed, writes, keep, given.state))
    else:
        states, values, state = scan(*_Chunks(values, removed, writes, keep, given.state))
        outputs = reads @ states + scores @ values
    return outputs.movedim(1, 3).flatten(1, 2)[:, :length], state


class _Chunks(NamedTuple):
    """Operands of the pass through the chunks: [batch, heads, chunks, ...]."""

    values: Tensor
    """Values to write, [size, value_dim]; under the delta rule without what the state before the chunk holds."""
    removed: Tensor | None
    """Keys whose values in that state are taken off, [size, key_dim]."""
    keys: Tensor
    """Keys to write by, decayed to the end of the chunk, [size, key_dim]."""
    keep: Tensor | None
    """Factor on the state, [1 or key_dim, 1]."""
    state: Tensor
    """State before the first chunk, [batch, heads, key_dim, value_dim]."""


Scan = Callable[[Tensor, Tensor | None, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From the fields of chunks, the state before each, the values that each writes, and the state after the last."""


def _loop(reads: Tensor, scores: Tensor, chunks: _Chunks) -> tuple[Tensor, Tensor]:
    """Return the outputs of all chunks, and the state after the last."""
    # Slices inside the loop would each cost a zero-filled tensor in the backward pass: unbound before, they do not.
    removed, keep = (None if x is None else x.unbind(2) for x in (chunks.removed, chunks.keep))
    queries, pairs, writes = reads.unbind(2), scores.unbind(2), chunks.keys.mT.unbind(2)
    state, outputs = chunks.state, []
    for index, value in enumerate(chunks.values.unbind(2)):
        if removed is not None:
            value = value - removed[index] @ state
        outputs.append(queries[index] @ state + pairs[index] @ value)
        state = (state if keep is None else state * keep[index]) + writes[index] @ value
    return torch.stack(outputs, 2), state


class _Given(NamedTuple):
    """The arguments in the type in which sums are taken; decays and strengths have a last axis to broadcast."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    state: Tensor


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor | None
) -> _Given:
    if q.shape != k.shape or q.dim() != 4 or q.shape[:2] != v.shape[:2] or v.size(2) % k.size(2):
        raise ConfigurationError(
            f"q has shape {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}; needed are [batch, seq, heads, "
            "dim], q and k alike, and heads of v that are a multiple of theirs."
        )
    dtype = torch.promote_types(v.dtype, torch.float32)
    decay = None if log_decay is None else (log_decay[..., None] if log_decay.dim() == 3 else log_decay).to(dtype)
    if state is None:
        state = v.new_zeros((v.size(0), v.size(2), k.size(3), v.size(3)), dtype=dtype)
    strength = None if beta is None else beta[..., None].to(dtype)
    return _Given(q.to(dtype), k.to(dtype), v.to(dtype), decay, strength, state.to(dtype))


class _Edges(NamedTuple):
    """Tokens whose documents continue: [batch, 1, chunks, ...]."""

    together: Bool[Tensor, "batch 1 chunks size size"]
    """Pairs of tokens of one document."""
    from_before: Bool[Tensor, "batch 1 chunks size 1"]
    """Tokens of the document that the state before the chunk belongs to."""
    to_after: Bool[Tensor, "batch 1 chunks size 1"]
    """Tokens of the document that the state after the chunk belongs to."""
    through: Bool[Tensor, "batch 1 chunks 1 1"]
    """Chunks that are a single document with what came before."""


def _document_edges(document_ids: Tensor | None, size: int, padding: int) -> _Edges | None:
    if document_ids is None:
        return None
    numbers = number_documents(document_ids)
    numbers = torch.cat((numbers, numbers[:, -1:].expand(-1, padding)), 1).unflatten(1, (-1, size))[:, None]
    last = numbers[..., -1:]
    before = torch.cat((numbers[:, :, :1, :1], last[:, :, :-1]), 2)
    return _Edges(
        together=numbers[..., :, None] == numbers[..., None, :],
        from_before=(numbers == before)[..., None],
        to_after=(numbers == last)[..., None],
        through=(last == before)[..., None],
    )


def _pairs(cumulative: Tensor | None, seen: Tensor, groups: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function of all products ``a_i . b_j`` with the decay from token j to token i, 0 where not seen.

    Args:
        cumulative: Sums of the logarithms of the decays, [..., size, 1 or key_dim]; ``None`` for no decay.
        seen: Pairs that are taken.
        groups: Heads that share a head of keys.
    """
    decay: Tensor | None = None
    if cumulative is not None:
        differences = cumulative[..., :, None, :] - cumulative[..., None, :, :]
        decay = differences.masked_fill(~seen[..., None], -torch.inf).exp()

    def products(a: Tensor, b: Tensor) -> Tensor:
        if decay is not None and decay.size(-1) > 1:
            a, b = a.repeat_interleave(groups, 1), b.repeat_interleave(groups, 1)
            return (a[..., :, None, :] * b[..., None, :, :] * decay).sum(-1)
        scores = (a @ b.mT).repeat_interleave(groups, 1) if groups > 1 else a @ b.mT
        return scores.masked_fill(~seen, 0) if decay is None else scores * decay[..., 0]

    return products


Scaled = Callable[[Tensor], Tensor]


def _boundaries(cumulative: Tensor | None, edges: _Edges | None) -> tuple[Scaled, Scaled, Tensor | None]:
    """Return how queries reach the state before a chunk, keys the state after it, and the factor to the next one."""

    def into(x: Tensor) -> Tensor:
        x = x if cumulative is None else x * cumulative.exp()
        return x if edges is None else x * edges.from_before

    def out(x: Tensor) -> Tensor:
        x = x if cumulative is None else x * (cumulative[..., -1:, :] - cumulative).exp()
        return x if edges is None else x * edges.to_after

    keep = None if cumulative is None else cumulative[..., -1, :, None].exp()
    if edges is not None:
        keep = edges.through if keep is None else keep * edges.through
    return into, out, keep


def _solve(products: Tensor, beta: Tensor, targets: Tensor) -> Tensor:
    """Return what the delta rule writes: each token's target without what earlier tokens of the chunk wrote already.

    Args:
        products: Decayed products of the keys, [..., size, size].
        beta: Writing strengths, [..., size, 1].
        targets: Values, and what else is corrected in the same way, [..., size, dim].
    """
    system = torch.tril(products * beta, -1)
    return cast(Tensor, torch.linalg.solve_triangular(system, targets * beta, upper=False, unitriangular=True))

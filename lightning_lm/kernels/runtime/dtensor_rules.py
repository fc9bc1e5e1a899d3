"""DTensor rules of our operators: the dimensions that may be sharded, and the placements of the results.

An operator that works on rows lets every axis but that of features be cut, so a norm runs on a shard of the batch or of
the sequence; one that works on single numbers lets any. Gradients of gains, which are sums over all rows, become
``Partial``. What is cut otherwise is gathered by torch before.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

__all__ = ["register_shardings"]

Placed = tuple[list[Any], list[Any]]
_WHOLE = Replicate()


@functools.cache
def register_shardings() -> None:
    """Tell torch's DTensor about our operators, once."""
    for name, rule in _RULES.items():
        register_sharding(getattr(torch.ops.lightning_lm, name).default)(_listed(rule))


def _listed(rule: Callable[..., Iterator[Placed]]) -> Callable[..., list[Placed]]:
    return lambda *arguments: list(rule(*arguments))


def _placements(x: Any, axes: int) -> Iterator[Any]:
    """Yield that nothing is cut, and that one of the first axes is."""
    yield _WHOLE
    yield from (Shard(axis) for axis in range(axes))


def _like(tensor: Any, placement: Any) -> Any:
    """Return the placement of an argument that may be absent, or empty where another is absent."""
    if tensor is None:
        return None
    return _WHOLE if list(tensor.shape) == [0] else placement


def _partial(parameter: Any, placement: Any) -> Any:
    """Return the placement of a gradient that is a sum over rows."""
    return Partial() if parameter is not None and placement != _WHOLE else _WHOLE


def _rms_norm(x: Any, weight: Any, residual: Any, *options: Any) -> Iterator[Placed]:
    for placed in _placements(x, x.ndim - 1):
        total = _WHOLE if residual is None else placed
        yield [placed, total, placed], [placed, _like(weight, _WHOLE), _like(residual, placed), *_none(options)]


def _rms_norm_backward(grad: Any, grad_sum: Any, x: Any, weight: Any, scale: Any, *options: Any) -> Iterator[Placed]:
    for placed in _placements(x, x.ndim - 1):
        given = [_like(grad, placed), _like(grad_sum, placed), placed, _like(weight, _WHOLE), placed]
        yield [placed, _partial(weight, placed)], [*given, *_none(options)]


def _layer_norm(x: Any, weight: Any, bias: Any, *options: Any) -> Iterator[Placed]:
    for placed in _placements(x, x.ndim - 1):
        parameters = [_like(weight, _WHOLE), _like(bias, _WHOLE)]
        yield [placed, placed, placed], [placed, *parameters, *_none(options)]


def _layer_norm_backward(grad: Any, x: Any, weight: Any, bias: Any, *rest: Any) -> Iterator[Placed]:
    for placed in _placements(x, x.ndim - 1):
        given = [placed, placed, _like(weight, _WHOLE), _like(bias, _WHOLE), placed, placed]
        yield [placed, _partial(weight, placed), _partial(bias, placed)], [*given, *_none(rest[2:])]


def _softmax(x: Any) -> Iterator[Placed]:
    yield from (([placed], [placed]) for placed in _placements(x, x.ndim - 1))


def _softmax_backward(grad: Any, y: Any) -> Iterator[Placed]:
    yield from (([placed], [placed, placed]) for placed in _placements(y, y.ndim - 1))


def _each_number(num_tensors: int, num_results: int) -> Callable[..., Iterator[Placed]]:
    """Return the rule of an operator that works on single numbers of tensors of one shape."""

    def rule(*arguments: Any) -> Iterator[Placed]:
        options = arguments[num_tensors:]
        for placed in _placements(arguments[0], arguments[0].ndim):
            yield [placed] * num_results, [*[placed] * num_tensors, *_none(options)]

    return rule


def _rope(q: Any, k: Any, cos: Any, sin: Any, q_gain: Any, k_gain: Any, *options: Any) -> Iterator[Placed]:
    for placed, table in _rotated(q, cos):
        gains = [_like(q_gain, _WHOLE), _like(k_gain, _WHOLE)]
        yield [placed, placed], [placed, placed, table, table, *gains, *_none(options)]


def _rope_backward(grad_q: Any, grad_k: Any, q: Any, k: Any, cos: Any, sin: Any, *rest: Any) -> Iterator[Placed]:
    q_gain, k_gain, *options = rest
    for placed, table in _rotated(grad_q, cos):
        given = [placed, placed, _like(q, placed), _like(k, placed), table, table]
        gains = [_like(q_gain, _WHOLE), _like(k_gain, _WHOLE)]
        yield (
            [placed, placed, _partial(q_gain, placed), _partial(k_gain, placed)],
            [*given, *gains, *_none(options)],
        )


def _rotated(q: Any, cos: Any) -> Iterator[tuple[Any, Any]]:
    """Yield placements of heads, [batch, seq, heads, head_dim], and of tables, [*batch, seq, 1, rotary_dim]."""
    own_rows = cos.ndim == q.ndim and cos.shape[0] == q.shape[0]
    yield _WHOLE, _WHOLE
    yield Shard(0), Shard(0) if own_rows else _WHOLE
    yield Shard(1), Shard(cos.ndim - 3)
    yield Shard(2), _WHOLE


def _flash_attention(query: Any, key: Any, value: Any, first: Any, scales: Any) -> Iterator[Placed]:
    for placed, starts in _attended(query, key, first):
        yield [placed, placed], [placed, placed, placed, starts, None]


def _flash_attention_backward(grad: Any, query: Any, key: Any, value: Any, first: Any, *rest: Any) -> Iterator[Placed]:
    for placed, starts in _attended(query, key, first):
        yield [placed, placed, placed], [placed, placed, placed, placed, starts, placed, placed, None]


def _attended(query: Any, key: Any, first: Any) -> Iterator[tuple[Any, Any]]:
    """Yield placements of heads, [batch, heads, seq, head_dim], and of first keys, [batch, seq]."""
    yield _WHOLE, _like(first, _WHOLE)
    yield Shard(0), _like(first, _WHOLE if first is not None and first.shape[0] == 1 else Shard(0))
    if key.shape[1] % query.mesh.size() == 0:  # whole groups of heads
        yield Shard(1), _like(first, _WHOLE)


def _none(options: Any) -> list[None]:
    return [None for _ in options]


_RULES: dict[str, Callable[..., Iterator[Placed]]] = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "softmax": _softmax,
    "softmax_backward": _softmax_backward,
    "gated_unit": _each_number(2, 1),
    "gated_unit_backward": _each_number(3, 2),
    "relu_squared": _each_number(1, 1),
    "relu_squared_backward": _each_number(2, 1),
    "rope": _rope,
    "rope_backward": _rope_backward,
    "flash_attention": _flash_attention,
    "flash_attention_backward": _flash_attention_backward,
}

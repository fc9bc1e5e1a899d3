"""Tuning targets: for each kernel the sizes it is stored under, the candidate settings, and a workload to time."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lm.functional.rope import rope_frequencies, rope_table
from lightning_lm.kernels.flash_attention.operation import flash_attention
from lightning_lm.kernels.layer_norm import layer_norm
from lightning_lm.kernels.lm_head.cross_entropy import cross_entropy
from lightning_lm.kernels.newton_schulz import symmetric_product
from lightning_lm.kernels.relu_squared import relu_squared
from lightning_lm.kernels.rms_norm import rms_norm
from lightning_lm.kernels.rope import rope
from lightning_lm.kernels.runtime.launch import next_power_of_two
from lightning_lm.kernels.softmax import softmax
from lightning_lm.kernels.swiglu import swiglu

__all__ = ["TUNABLE", "Bench", "Tunable"]

Dims = tuple[int, ...]
Results = tuple[Tensor, ...]
Settings = dict[str, int]
_MOST_LOGITS = 2**28
"""Half a gigabyte in half precision."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Device and problem sizes of a tuning run.

    Args:
        device: Device on which kernels run.
        dtype: Data type of their main operand.
        tokens: Rows that they work on.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int

    def make(self, *shape: int) -> Tensor:
        """Return normal numbers that want a gradient."""
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()


@dataclass(frozen=True, kw_only=True)
class Tunable:
    """A kernel whose launch settings can be measured.

    Args:
        sizes: Names of the sizes that settings are kept by.
        usual: Sizes that are tuned if none are asked for.
        small: Sizes to rehearse with.
        candidates: From the sizes and the bytes of a number, the settings worth a try.
        work: From the sizes and a bench, what is timed; it returns its results, for comparison.
    """

    sizes: tuple[str, ...]
    usual: tuple[Dims, ...]
    small: Dims
    candidates: Callable[[Dims, int], Iterator[Settings]]
    work: Callable[[Dims, Bench], Callable[[], Results]]


def _product(**choices: tuple[int, ...]) -> Iterator[Settings]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _rows(dims: Dims, itemsize: int, programs: tuple[int, ...] = ()) -> Iterator[Settings]:
    """Yield settings with 2 to 64 numbers a thread."""
    block = next_power_of_two(dims[0])
    more = {"PROGRAMS": programs} if programs else {}
    for chosen in _product(ROWS=(1, 2, 4, 8, 16), num_warps=(1, 2, 4, 8, 16), **more):
        if 2 <= chosen["ROWS"] * block // (32 * chosen["num_warps"]) <= 64:
            yield chosen


def _rows_and_sums(dims: Dims, itemsize: int) -> Iterator[Settings]:
    return _rows(dims, itemsize, (132, 264, 528, 1056))


def _pieces(dims: Dims, itemsize: int) -> Iterator[Settings]:
    return _product(BLOCK=(512, 1024, 2048, 4096), num_warps=(2, 4, 8))


def _warps(dims: Dims, itemsize: int) -> Iterator[Settings]:
    return _product(num_warps=(1, 2, 4, 8, 16))


def _vocabulary(dims: Dims, itemsize: int) -> Iterator[Settings]:
    return _product(BLOCK=(1024, 2048, 4096, 8192), num_warps=(4, 8, 16))


def _attention_tiles(dims: Dims, itemsize: int) -> Iterator[Settings]:
    tiles = (32, 64, 128) if itemsize == 2 else (16, 32, 64)
    return _product(BLOCK_Q=tiles, BLOCK_K=tiles, num_warps=(4, 8), num_stages=(1, 2, 3))


def _product_tiles(dims: Dims, itemsize: int) -> Iterator[Settings]:
    return _product(
        BLOCK=(64, 128), BLOCK_K=(32, 64) if itemsize == 2 else (16, 32), num_warps=(4, 8), num_stages=(2, 3, 4)
    )


def _no_gradient(function: Callable[[], Tensor]) -> Callable[[], Results]:
    def run() -> Results:
        with torch.no_grad():
            return (function(),)

    return run


def _backward(results: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Callable[[], Results]:
    """Return the backward pass alone."""
    upstream = [torch.randn_like(result) for result in results]
    return lambda: torch.autograd.grad(results, inputs, upstream, retain_graph=True)


def _norm(dims: Dims, bench: Bench) -> Callable[[], Results]:
    x, weight = bench.make(bench.tokens, *dims), bench.make(*dims)
    return _no_gradient(lambda: rms_norm(x, weight))


def _norm_backward(dims: Dims, bench: Bench) -> Callable[[], Results]:
    inputs = bench.make(bench.tokens, *dims), bench.make(*dims)
    return _backward((rms_norm(*inputs),), inputs)


def _center(dims: Dims, bench: Bench) -> Callable[[], Results]:
    x, weight, bias = bench.make(bench.tokens, *dims), bench.make(*dims), bench.make(*dims)
    return _no_gradient(lambda: layer_norm(x, weight, bias))


def _center_backward(dims: Dims, bench: Bench) -> Callable[[], Results]:
    inputs = bench.make(bench.tokens, *dims), bench.make(*dims), bench.make(*dims)
    return _backward((layer_norm(*inputs),), inputs)


def _both(function: Callable[..., Tensor], inputs: Results) -> Callable[[], Results]:
    """Return the forward and the backward pass, for kernels that share their settings."""
    upstream = torch.randn_like(function(*inputs))

    def run() -> Results:
        result = function(*inputs)
        return result, *torch.autograd.grad(result, inputs, upstream)

    return run


def _softmax(dims: Dims, bench: Bench) -> Callable[[], Results]:
    return _both(softmax, (bench.make(bench.tokens, *dims),))


def _gated(dims: Dims, bench: Bench) -> Callable[[], Results]:
    return _both(swiglu, (bench.make(bench.tokens, *dims), bench.make(bench.tokens, *dims)))


def _relu(dims: Dims, bench: Bench) -> Callable[[], Results]:
    return _both(relu_squared, (bench.make(bench.tokens, *dims),))


def _turn(dims: Dims, bench: Bench) -> Callable[[], Results]:
    heads, kv_heads, size = dims
    cos, sin = (table.to(bench.device) for table in rope_table(rope_frequencies(size), bench.tokens))
    inputs = bench.make(1, bench.tokens, heads, size), bench.make(1, bench.tokens, kv_heads, size)
    upstream = [torch.randn_like(one) for one in inputs]

    def run() -> Results:
        results = rope(*inputs, cos, sin)
        return *results, *torch.autograd.grad(results, inputs, upstream)

    return run


def _entropy(dims: Dims, bench: Bench) -> Callable[[], Results]:
    tokens = max(1, min(bench.tokens, _MOST_LOGITS // dims[0]))
    targets = torch.randint(0, dims[0], (tokens,), device=bench.device)
    return _both(lambda logits: cross_entropy(logits, targets).loss_sum, (bench.make(tokens, *dims),))


def _heads(dims: Dims, bench: Bench) -> Results:
    query, key, value = (bench.make(1, heads, bench.tokens, *dims) for heads in (8, 2, 2))
    return query, key, value


def _attend(dims: Dims, bench: Bench) -> Callable[[], Results]:
    inputs = _heads(dims, bench)
    return _no_gradient(lambda: flash_attention(*inputs))


def _attend_backward(dims: Dims, bench: Bench) -> Callable[[], Results]:
    inputs = _heads(dims, bench)
    return _backward((flash_attention(*inputs),), inputs)


def _symmetric(dims: Dims, bench: Bench) -> Callable[[], Results]:
    x = bench.make(1, *dims).detach()
    return lambda: (symmetric_product(x, least_rows=1),)


def _of_rows(work: Callable[[Dims, Bench], Callable[[], Results]], *, sums: bool = False) -> Tunable:
    settings, usual = (_rows_and_sums if sums else _rows), ((1024,), (2048,), (4096,))
    return Tunable(sizes=("features",), usual=usual, small=(64,), candidates=settings, work=work)


def _of_pieces(work: Callable[[Dims, Bench], Callable[[], Results]]) -> Tunable:
    usual = ((2816,), (5632,), (8192,))
    return Tunable(sizes=("features",), usual=usual, small=(96,), candidates=_pieces, work=work)


def _of_heads(work: Callable[[Dims, Bench], Callable[[], Results]]) -> Tunable:
    usual = ((64,), (128,))
    return Tunable(sizes=("head_dim",), usual=usual, small=(16,), candidates=_attention_tiles, work=work)


TUNABLE = {
    "rms_norm": _of_rows(_norm),
    "rms_norm_backward": _of_rows(_norm_backward, sums=True),
    "layer_norm": _of_rows(_center),
    "layer_norm_backward": _of_rows(_center_backward, sums=True),
    "softmax": _of_rows(_softmax),
    "gated_unit": _of_pieces(_gated),
    "relu_squared": _of_pieces(_relu),
    "rope": Tunable(
        sizes=("heads", "kv_heads", "head_dim"),
        usual=((32, 8, 128), (16, 16, 64)),
        small=(4, 2, 16),
        candidates=_warps,
        work=_turn,
    ),
    "vocabulary": Tunable(
        sizes=("vocabulary",), usual=((50304,), (128256,)), small=(300,), candidates=_vocabulary, work=_entropy
    ),
    "flash_attention": _of_heads(_attend),
    "flash_attention_queries": _of_heads(_attend_backward),
    "flash_attention_keys": _of_heads(_attend_backward),
    "newton_schulz": Tunable(
        sizes=("rows", "columns"),
        usual=((1024, 4096), (2048, 2048)),
        small=(70, 40),
        candidates=_product_tiles,
        work=_symmetric,
    ),
}
"""Every kernel that looks up its launch settings."""

"""Measurement of launch settings: candidates that compute the same are timed in turn with the present settings.

A kernel is timed forward and backward together, on random inputs. After one look at every candidate the fastest few run
in rounds with the present settings on fresh inputs, so that what slows down the device slows down all of them.
"""

import difflib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lm.errors import DataError, UsageError
from lightning_lm.functional.rope import rope_frequencies, rope_table
from lightning_lm.kernels.flash_attention.operation import flash_attention
from lightning_lm.kernels.grouped_linear import grouped_linear
from lightning_lm.kernels.layer_norm import layer_norm
from lightning_lm.kernels.lm_head.cross_entropy import cross_entropy
from lightning_lm.kernels.newton_schulz import symmetric_product
from lightning_lm.kernels.recurrence.chunk_scan import scan_chunks
from lightning_lm.kernels.relu_squared import relu_squared
from lightning_lm.kernels.rms_norm import rms_norm
from lightning_lm.kernels.rope import rope
from lightning_lm.kernels.runtime.launch import next_power_of_two, triton_version
from lightning_lm.kernels.runtime.launch_settings import Entry, device_name, read_table, trial, write_table
from lightning_lm.kernels.softmax import softmax
from lightning_lm.kernels.swiglu import swiglu

__all__ = ["TUNABLE", "Bench", "Stopwatch", "Tunable", "Tuned", "add_to_table", "parse_target", "tune"]

Dims = tuple[int, ...]
Run = Callable[[], tuple[Tensor, ...]]
Settings = dict[str, int]
_CACHE_BYTES = 2**30
"""More than the L2 cache of any GPU; overwriting so much also keeps it busy while Python prepares the next launch."""
_BOUNDS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Difference over the largest value that another order of summation explains."""
_WORTHWHILE = 0.98
"""Ratio of times from which other settings are worth an entry: what is closer may be noise."""


@dataclass(frozen=True)
class Bench:
    """Device and problem size of a tuning run.

    Args:
        device: Device on which kernels run.
        dtype: Data type of their main operand.
        tokens: Rows of the inputs.
        rehearsal: Measure once, and few candidates.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int
    rehearsal: bool = False

    def both(self, function: Callable[..., Any], *shapes: Dims) -> Run:
        """Return the forward and backward pass of a function over random inputs.

        Args:
            function: Differentiable function of one or more tensors.
            *shapes: Shapes of its inputs.
        """
        inputs = [torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_() for shape in shapes]
        upstream = [torch.randn_like(result) for result in _as_tuple(function(*inputs))]

        def run() -> tuple[Tensor, ...]:
            results = _as_tuple(function(*inputs))
            return *results, *torch.autograd.grad(results, inputs, upstream)

        return run


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


class Tunable(NamedTuple):
    """A kernel whose launch settings can be measured."""

    sizes: str
    """Names of the sizes under which settings are stored."""
    usual: Sequence[Dims]
    """Sizes that are tuned by default."""
    small: Dims
    """Sizes of a rehearsal."""
    choices: Mapping[str, Sequence[int]]
    """Values of each setting; candidates are their combinations."""
    work: Callable[..., Run]
    """Returns the function to time, given a bench and the sizes."""

    def candidates(self, dims: Dims) -> list[Settings]:
        """Return combinations of settings, for rows those with 2 to 64 elements a thread."""
        found = [dict(zip(self.choices, values, strict=True)) for values in itertools.product(*self.choices.values())]
        if "ROWS" not in self.choices:
            return found
        block = next_power_of_two(dims[0])
        return [one for one in found if 2 <= one["ROWS"] * block // (32 * one["num_warps"]) <= 64]


def _rms_norm(bench: Bench, size: int) -> Run:
    return bench.both(rms_norm, (bench.tokens, size), (size,))


def _layer_norm(bench: Bench, size: int) -> Run:
    return bench.both(layer_norm, (bench.tokens, size), (size,), (size,))


def _rope(bench: Bench, heads: int, kv_heads: int, size: int) -> Run:
    cos, sin = (table.to(bench.device) for table in rope_table(rope_frequencies(size), bench.tokens))
    shapes = [(1, bench.tokens, number, size) for number in (heads, kv_heads)]
    return bench.both(lambda query, key: rope(query, key, cos, sin), *shapes)


def _cross_entropy(bench: Bench, vocab_size: int) -> Run:
    tokens = max(1, min(bench.tokens, 2**28 // vocab_size))  # half a gigabyte of logits in half precision
    targets = torch.randint(0, vocab_size, (tokens,), device=bench.device)
    return bench.both(lambda logits: cross_entropy(logits, targets).loss_sum, (tokens, vocab_size))


def _attention(bench: Bench, size: int) -> Run:
    return bench.both(flash_attention, *((1, heads, bench.tokens, size) for heads in (8, 2, 2)))


def _symmetric(bench: Bench, rows: int, columns: int) -> Run:
    x = torch.randn(1, rows, columns, device=bench.device, dtype=bench.dtype)
    return lambda: (symmetric_product(x, least_rows=1),)


def _grouped(bench: Bench, experts: int, out_features: int, in_features: int) -> Run:
    rows = max(bench.tokens // experts, 1)
    counts = torch.full((experts,), rows, device=bench.device)
    shapes = (experts * rows, in_features), (experts, out_features, in_features)
    return bench.both(lambda x, weight: grouped_linear(x, weight, counts, prefer_triton=True), *shapes)


def _recurrence(bench: Bench, key_dim: int, value_dim: int) -> Run:
    size = min(bench.tokens, 64)
    chunks = 1, 16, bench.tokens // size, size
    shapes = (*chunks, value_dim), (*chunks, key_dim), (*chunks, key_dim), (1, 16, key_dim, value_dim)
    # Small keys: else the state grows from chunk to chunk.
    return bench.both(lambda v, w, k, state: scan_chunks(v, 0.05 * w, 0.05 * k, None, state), *shapes)


_WARPS = (1, 2, 4, 8, 16)
_TILES = {"BLOCK_Q": (16, 32, 64, 128), "BLOCK_K": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)}
_SQUARES = {"BLOCK": (64, 128), "BLOCK_K": (16, 32, 64), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
_GROUPED = {"BLOCK": (64, 128), "BLOCK_K": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3)}
_STATES = {"BLOCK_V": (16, 32, 64), "num_warps": (4, 8), "num_stages": (1, 2)}
_ROPE = {"num_warps": _WARPS}
_VOCABULARY = {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)}


def _row_kernel(work: Callable[[Bench, int], Run], **more: Sequence[int]) -> Tunable:
    choices = {"ROWS": (1, 2, 4, 8, 16), "num_warps": _WARPS, **more}
    return Tunable("features", [(1024,), (2048,), (4096,)], (64,), choices, work)


def _elementwise(function: Callable[..., Tensor], inputs: int) -> Tunable:
    choices = {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)}
    usual = [(2816,), (5632,), (8192,)]
    return Tunable("features", usual, (96,), choices, lambda b, n: b.both(function, *[(b.tokens, n)] * inputs))


TUNABLE = {
    "rms_norm": _row_kernel(_rms_norm),
    "rms_norm_backward": _row_kernel(_rms_norm, PROGRAMS=(132, 264, 528, 1056)),
    "layer_norm": _row_kernel(_layer_norm),
    "layer_norm_backward": _row_kernel(_layer_norm, PROGRAMS=(132, 264, 528, 1056)),
    "softmax": _row_kernel(lambda bench, size: bench.both(softmax, (bench.tokens, size))),
    "gated_unit": _elementwise(swiglu, 2),
    "relu_squared": _elementwise(relu_squared, 1),
    "rope": Tunable(
        "heads x kv_heads x head_dim", [(32, 8, 128), (16, 16, 64)], (4, 2, 16), {"num_warps": _WARPS}, _rope
    ),
    "vocabulary": Tunable("vocabulary", [(50304,), (128256,)], (300,), _VOCABULARY, _cross_entropy),
    "grouped_linear": Tunable(
        "experts x out_features x in_features", [(32, 768, 2048), (8, 4096, 4096)], (3, 40, 24), _GROUPED, _grouped
    ),
    "linear_recurrence": Tunable("key_dim x value_dim", [(64, 64), (128, 128)], (16, 16), _STATES, _recurrence),
    "newton_schulz": Tunable("rows x columns", [(1024, 4096), (2048, 2048)], (70, 40), _SQUARES, _symmetric),
    **dict.fromkeys(
        ("flash_attention", "flash_attention_queries", "flash_attention_keys"),
        Tunable("head_dim", [(64,), (128,)], (16,), _TILES, _attention),
    ),
}
"""Every kernel that looks up its launch settings."""


class Stopwatch:
    """Times a function on a device, after one call to warm up and with the L2 cache overwritten before each repetition.

    Args:
        device: Device of the function; anything but a CUDA device is timed by the clock.
        repetitions: Number of runs, of which the median counts.
    """

    def __init__(self, device: torch.device, repetitions: int) -> None:
        self.device, self.repetitions = device, repetitions
        size = _CACHE_BYTES if device.type == "cuda" else 0
        self._cache = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        """Return the median time of a call, in microseconds.

        Args:
            run: Function to time.
        """
        run()
        if self.device.type != "cuda":
            return statistics.median(_by_clock(run) for _ in range(self.repetitions))
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repetitions)]
        for begin, end in pairs:
            self._cache.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        times_ms: list[float] = [begin.elapsed_time(end) for begin, end in pairs]
        return 1e3 * statistics.median(times_ms)


def _by_clock(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - begin)


class Tuned(NamedTuple):
    """Result of tuning a kernel for some sizes."""

    entry: Entry
    """The fastest settings; those before, if none is clearly faster."""
    before: Settings
    ratio: float
    """Time after over time before, the median over rounds."""
    tried: int
    failed: int
    """Candidates that cannot be launched here, or compute something else."""

    @property
    def is_faster(self) -> bool:
        """True if other settings are worth an entry."""
        return self.entry.settings != self.before

    def __str__(self) -> str:
        name = f"{self.entry.operation}:{'x'.join(map(str, self.entry.dims))}"
        before, after = (" ".join(f"{k}={v}" for k, v in one.items()) for one in (self.before, self.entry.settings))
        times = f"{self.entry.before_us:.1f} -> {self.entry.after_us:.1f} us ({self.ratio:.2f})"
        tried = f"{self.tried} tried, {self.failed} failed"
        return f"{name}: {before} -> {after if self.is_faster else 'the same'}, {times}, {tried}"


def parse_target(text: str, *, rehearsal: bool = False) -> list[tuple[str, Dims]]:
    """Return the kernels and sizes that a word of the command line names.

    Args:
        text: A kernel, with sizes after a colon: ``rms_norm:1024,4096``, ``rope:32x8x128``; or the usual ones.
        rehearsal: Take small sizes instead of the usual ones.

    Raises:
        UsageError: If there is no such kernel, or it has other sizes.
    """
    name, _, sizes = text.partition(":")
    if name not in TUNABLE:
        near = difflib.get_close_matches(name, TUNABLE, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"There is no kernel {name!r} to tune.{hint} There are: {', '.join(TUNABLE)}.")
    tunable = TUNABLE[name]
    if not sizes:
        return [(name, dims) for dims in ((tunable.small,) if rehearsal else tunable.usual)]
    for word in sizes.split(","):
        numbers = word.split("x")
        if len(numbers) != len(tunable.small) or not all(number.isdecimal() and int(number) for number in numbers):
            example = f"{name}:{'x'.join(map(str, tunable.usual[0]))}"
            raise UsageError(f"{name} is tuned for {tunable.sizes}, such as {example}; got {word!r}.")
    return [(name, tuple(map(int, word.split("x")))) for word in sizes.split(",")]


def tune(operation: str, dims: Dims, bench: Bench) -> Tuned:
    """Find the fastest launch settings of a kernel.

    Args:
        operation: Name of the kernel, a key of `TUNABLE`.
        dims: Sizes that it is tuned for.
        bench: Device and problem size.

    Raises:
        UsageError: If the kernel cannot run with these sizes and this type.
    """
    tunable, stopwatch = TUNABLE[operation], Stopwatch(bench.device, 1 if bench.rehearsal else 50)
    with trial(operation) as current:
        run = tunable.work(bench, *dims)
        exact = run()
    before = current.launched
    if not before:
        raise UsageError(
            f"{operation}:{'x'.join(map(str, dims))} looked up no launch settings for {bench.dtype}: kernels of such "
            "sizes have none, or torch ran it and `lightning-lm kernels report` says why."
        )
    found = tunable.candidates(dims)
    found = found[:: math.ceil(len(found) / 3)] if bench.rehearsal else found
    times = [_look(_with(run, operation, settings), stopwatch, exact) for settings in found]
    ranked = sorted((time_us, place) for place, time_us in enumerate(times) if time_us is not None)
    others = [found[place] for _, place in ranked if {**before, **found[place]} != before]
    finalists = [None, *others[:4]]
    rounds = []
    for _ in range(1 if bench.rehearsal else 7):
        fresh = tunable.work(bench, *dims)
        rounds.append([stopwatch(_with(fresh, operation, settings)) for settings in finalists])
    ratios = [statistics.median(row[place] / row[0] for row in rounds) for place in range(len(finalists))]
    best = min(range(len(ratios)), key=lambda place: ratios[place])
    best = best if ratios[best] <= _WORTHWHILE else 0
    before_us, after_us = (round(statistics.median(row[place] for row in rounds), 2) for place in (0, best))
    entry = Entry(
        device=device_name(bench.device), operation=operation, dims=dims, dtype=str(bench.dtype).removeprefix("torch."),
        triton=triton_version(), settings={**before, **(finalists[best] or {})}, before_us=before_us,
        after_us=after_us, torch=torch.__version__, date=datetime.now(UTC).date().isoformat(),
    )  # fmt: skip
    return Tuned(entry, before, ratios[best], len(found), times.count(None))


def _with(run: Run, operation: str, settings: Settings | None) -> Run:
    def launched() -> tuple[Tensor, ...]:
        with trial(operation, settings):
            return run()

    return launched


def _look(launched: Run, stopwatch: Stopwatch, exact: Sequence[Tensor]) -> float | None:
    """Return the time with some settings; ``None`` if they cannot be launched or compute something else."""
    from triton.errors import TritonError

    try:
        return stopwatch(launched) if all(map(_agree, launched(), exact)) else None
    except (TritonError, RuntimeError, ValueError):  # too large for this device, or for a single program
        return None


def _agree(found: Tensor, exact: Tensor) -> bool:
    largest = exact.abs().max().clamp(min=1e-30)
    return bool((found.float() - exact.float()).abs().max() / largest <= _BOUNDS[exact.dtype])


def add_to_table(path: Path, found: Iterable[Tuned]) -> int:
    """Write faster settings into a table, beside its other entries, and return the number of entries.

    Args:
        path: The table; one that cannot be read is replaced.
        found: Results of `tune`.
    """
    try:
        entries = {entry.key: entry for entry in read_table(path)} if path.exists() else {}
    except DataError:
        entries = {}
    entries |= {one.entry.key: one.entry for one in found if one.is_faster}
    write_table(path, entries.values())
    return len(entries)

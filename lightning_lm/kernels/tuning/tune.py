"""Measuring launch settings: candidates that compute the same take turns with what would be launched without them."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lm.errors import DataError, UsageError
from lightning_lm.kernels.runtime.launch import triton_version
from lightning_lm.kernels.runtime.launch_settings import Entry, device_name, read_table, trial, write_table
from lightning_lm.kernels.tuning.targets import TUNABLE, Bench, Dims, Results, Settings

__all__ = ["Effort", "Stopwatch", "Target", "Tuned", "add_to_table", "candidates", "parse_target", "take_turns", "tune"]

Run = Callable[[], object]
_CACHE_BYTES = 2**30
"""More than the L2 cache of any GPU; overwriting so much also keeps it busy while Python prepares the next launch."""


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

    def __call__(self, run: Run) -> float:
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


def take_turns(make: Callable[[], Sequence[Run]], stopwatch: Stopwatch, rounds: int) -> list[tuple[float, float]]:
    """Return for each of several functions its median time, and the median of its ratios to the first one's time.

    In each round all of them work once on the same fresh inputs, so what slows down the device slows down all.

    Args:
        make: Returns the functions, with new random inputs.
        stopwatch: Times a function.
        rounds: Number of turns.

    Example:
        >>> times = iter([2.0, 1.0, 4.0, 3.0, 2.0, 1.0])
        >>> take_turns(lambda: [print, print], lambda run: next(times), 3)  # type: ignore[arg-type]
        [(2.0, 1.0), (1.0, 0.5)]
    """
    times = [[stopwatch(run) for run in make()] for _ in range(rounds)]
    ratios = [[time_us / row[0] for time_us in row] for row in times]
    middles = (map(statistics.median, zip(*table, strict=True)) for table in (times, ratios))
    return list(zip(*middles, strict=True))


def _by_clock(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - begin)


_BOUNDS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Difference over the largest value that another order of summation explains."""
_WORTHWHILE = 0.98
"""Ratio of times from which other settings are worth an entry: what is closer may be noise."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Duration of the measurement.

    Args:
        repetitions: Timed calls, of which the median counts.
        finalists: Candidates that take turns with the settings so far, after one look at all of them.
        rounds: Number of rounds.
        most: Candidates to look at; ``None`` for all.
    """

    repetitions: int = 50
    finalists: int = 4
    rounds: int = 7
    most: int | None = None


@dataclass(frozen=True)
class Target:
    """A kernel, and the sizes that it is tuned for."""

    operation: str
    dims: Dims

    def __str__(self) -> str:
        return f"{self.operation}:{'x'.join(map(str, self.dims))}"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Result of tuning a target."""

    target: Target
    before: Settings
    before_us: float
    after: Settings
    """The fastest settings; those before, if none is clearly faster."""
    after_us: float
    ratio: float
    """Time after over time before, the median over rounds in which both took turns."""
    tried: int
    failed: int
    """Candidates that cannot be launched here, or compute something else."""

    @property
    def is_faster(self) -> bool:
        """True if other settings are worth an entry."""
        return self.after != self.before


def parse_target(text: str, *, rehearsal: bool = False) -> list[Target]:
    """Return the targets that a word stands for.

    Args:
        text: A kernel, with sizes after a colon: ``rms_norm:1024,4096``, ``rope:32x8x128``; or the usual ones.
        rehearsal: Take small sizes instead of the usual ones.

    Raises:
        UsageError: If there is no such kernel, or the sizes are not those that it is kept by.
    """
    import difflib

    name, _, sizes = text.partition(":")
    if name not in TUNABLE:
        near = difflib.get_close_matches(name, TUNABLE, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"There is no kernel {name!r} to tune.{hint} There are: {', '.join(TUNABLE)}.")
    tunable = TUNABLE[name]
    if not sizes:
        return [Target(name, dims) for dims in ((tunable.small,) if rehearsal else tunable.usual)]
    found = []
    for word in sizes.split(","):
        numbers = word.split("x")
        if len(numbers) != len(tunable.sizes) or not all(number.isdecimal() and int(number) for number in numbers):
            example = "x".join(map(str, tunable.usual[0]))
            wanted = " x ".join(tunable.sizes)
            raise UsageError(f"{name} is tuned for {wanted}, such as {name}:{example}; {word!r} is something else.")
        found.append(Target(name, tuple(map(int, numbers))))
    return found


def candidates(target: Target, dtype: torch.dtype, effort: Effort) -> list[Settings]:
    """Return the settings that `tune` looks at.

    Args:
        target: Target to tune.
        dtype: Data type of the kernel's main operand.
        effort: Largest number of candidates.
    """
    found = list(TUNABLE[target.operation].candidates(target.dims, dtype.itemsize))
    if effort.most is None or len(found) <= effort.most:
        return found
    return found[:: math.ceil(len(found) / effort.most)]


def tune(target: Target, bench: Bench, *, effort: Effort, advance: Callable[[], object] = lambda: None) -> Tuned:
    """Find the fastest launch settings of a kernel.

    Every candidate must first compute what is computed now; one look at all of them then chooses the finalists, which
    take turns with the settings so far on fresh inputs.

    Args:
        target: Target to tune.
        bench: Device and problem size.
        effort: Duration of the measurement.
        advance: Called after each candidate.

    Raises:
        UsageError: If the kernel cannot run with these sizes and this type.
    """
    operation, work = target.operation, TUNABLE[target.operation].work
    stopwatch = Stopwatch(bench.device, effort.repetitions)
    with trial(operation) as current:
        run = work(target.dims, bench)
        exact = run()
    if not current.launched:
        raise UsageError(
            f"{target} looked up no launch settings for {bench.dtype}: kernels of such sizes have none, or torch "
            "ran it and `lightning-lm kernels report` says why."
        )
    timed, failed = [], 0
    for settings in (found := candidates(target, bench.dtype, effort)):
        time_us = _look(run, operation, settings, stopwatch, exact)
        failed += time_us is None
        if time_us is not None and {**current.launched, **settings} != current.launched:
            timed.append((time_us, settings))
        advance()
    finalists = [settings for _, settings in sorted(timed, key=lambda pair: pair[0])[: effort.finalists]]

    def make() -> Sequence[Callable[[], object]]:
        fresh = work(target.dims, bench)
        return [_with(fresh, operation, settings) for settings in (None, *finalists)]

    results = take_turns(make, stopwatch, effort.rounds)
    best = min(range(len(results)), key=lambda number: results[number][1])
    best = best if results[best][1] <= _WORTHWHILE else 0
    after = {**current.launched, **finalists[best - 1]} if best else current.launched
    return Tuned(
        target=target, before=current.launched, before_us=results[0][0], after=after, after_us=results[best][0],
        ratio=results[best][1], tried=len(found), failed=failed,
    )  # fmt: skip


def add_to_table(path: Path, found: Iterable[Tuned], bench: Bench) -> int:
    """Write what is faster into a table, beside what it holds about other kernels, and return how many entries it has.

    Args:
        path: The table; one that cannot be read is replaced.
        found: From `tune`.
        bench: That it was found with.
    """
    try:
        entries = {entry.key: entry for entry in read_table(path)} if path.exists() else {}
    except DataError:
        entries = {}
    blank = Entry(
        device=device_name(bench.device), operation="", dims=(), dtype=str(bench.dtype).removeprefix("torch."),
        triton=triton_version(), settings={}, before_us=0.0, after_us=0.0, torch=torch.__version__,
        date=datetime.now(UTC).date().isoformat(),
    )  # fmt: skip
    for one in found:
        if one.is_faster:
            entry = replace(blank, operation=one.target.operation, dims=one.target.dims, settings=one.after)
            entry = replace(entry, before_us=round(one.before_us, 2), after_us=round(one.after_us, 2))
            entries[entry.key] = entry
    write_table(path, entries.values())
    return len(entries)


def _with(run: Callable[[], Results], operation: str, settings: Settings | None) -> Callable[[], Results]:
    def launched() -> Results:
        with trial(operation, settings):
            return run()

    return launched


def _look(
    run: Callable[[], Results], operation: str, settings: Settings, stopwatch: Stopwatch, exact: Results
) -> float | None:
    """Return the time with some settings, or nothing if they cannot be launched or compute something else."""
    from triton.errors import TritonError

    launched = _with(run, operation, settings)
    try:
        if not all(map(_agree, launched(), exact)):
            return None
        return stopwatch(launched)
    except (TritonError, RuntimeError, ValueError):  # too large for this device, or for a single program
        return None


def _agree(found: Tensor, exact: Tensor) -> bool:
    largest = exact.abs().max().clamp(min=1e-30)
    error: Any = (found.float() - exact.float()).abs().max() / largest
    return bool(error <= _BOUNDS[exact.dtype])

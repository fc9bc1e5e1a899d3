"""Timing and comparison of launches: warm, with a cold cache, in turns."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["Stopwatch", "take_turns"]

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

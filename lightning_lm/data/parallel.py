"""Work on many items in several processes, with the results in the order of the items."""

import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from lightning_lm.errors import DataError

__all__ = ["follow_parent", "map_chunks", "num_cores", "start_method"]

Result = TypeVar("Result")

_CHUNK = 1024


def map_chunks(
    function: Callable[[int, list[Any]], Result], items: Iterable[Any], *, num_workers: int, chunk: int = _CHUNK
) -> Iterator[Result]:
    """Yield what a function makes of each chunk of items, in order; few items are never worth a process.

    Args:
        function: Gets the number of a chunk's first item and the items. Must be picklable.
        items: In order; not many more are read than are worked on.
        num_workers: Processes.
        chunk: Items handed over at once.

    Raises:
        DataError: If a process was killed.
    """
    chunks = _chunks(items, chunk)
    head = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(head, chunks)
    if num_workers > 1 and len(head) > 1:
        yield from _in_processes(function, chunks, num_workers)
        return
    for first, part in chunks:
        yield function(first, part)


def _chunks(items: Iterable[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    iterator = iter(items)
    first = 0
    while part := list(itertools.islice(iterator, size)):
        yield first, part
        first += len(part)


def _in_processes(
    function: Callable[[int, list[Any]], Result], chunks: Iterable[tuple[int, list[Any]]], num_workers: int
) -> Iterator[Result]:
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, start_method(), _start_worker, (function, os.getpid()))
    waiting: deque[concurrent.futures.Future[Result]] = deque()
    try:
        for first, part in chunks:
            waiting.append(pool.submit(_work, first, part))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "A process that encoded examples was killed, perhaps for want of memory. Use fewer processes: "
            "Loading(tokenize_workers=...)."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_of_worker: dict[str, Callable[[int, list[Any]], Any]] = {}


def _start_worker(function: Callable[[int, list[Any]], Any], parent: int) -> None:
    _of_worker["function"] = function
    follow_parent(parent)


def _work(first: int, items: list[Any]) -> Any:
    return _of_worker["function"](first, items)


def start_method() -> BaseContext:
    """Return how processes are started: forked, where that can be done.

    A forked process has what it needs already, and asks for no ``if __name__ == "__main__"`` in the user's script.
    """
    return multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")


def follow_parent(parent: int) -> None:
    """Leave interrupts to the process that started this one, and end when that one was killed.

    Args:
        parent: Number of the process that started this one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent was killed: nobody else would."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

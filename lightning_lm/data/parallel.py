"""Work on many items in several processes, with the results in the order of the items."""

import concurrent.futures
import functools
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

__all__ = ["in_order", "map_chunks"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNK = 1024


def map_chunks(
    function: Callable[[int, list[Any]], Result], items: Iterable[Any], *, num_workers: int, chunk: int = _CHUNK
) -> Iterator[Result]:
    """Yield the results of a function over chunks of items, in order; see `in_order`.

    Args:
        function: Takes the index of a chunk's first item and the items.
        items: Items in order.
        num_workers: Processes.
        chunk: Items of a chunk.

    Raises:
        DataError: If a process was killed.
    """
    remedy = "Use fewer processes: Loading(tokenize_workers=...)."
    on_chunk = functools.partial(_on_chunk, function)
    yield from in_order(on_chunk, _chunks(items, chunk), num_workers=num_workers, remedy=remedy)


def _on_chunk(function: Callable[[int, list[Any]], Result], chunk: tuple[int, list[Any]]) -> Result:
    return function(*chunk)


def _chunks(items: Iterable[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    iterator = iter(items)
    first = 0
    while part := list(itertools.islice(iterator, size)):
        yield first, part
        first += len(part)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int, remedy: str
) -> Iterator[Result]:
    """Yield the results of a function over items, in order; a single item is never worth a process.

    Args:
        function: Must be picklable where processes cannot be forked.
        items: Items in order; at most a few more are read than are being worked on.
        num_workers: Processes.
        remedy: Way out if a process was killed.

    Raises:
        DataError: If a process was killed.
    """
    iterator = iter(items)
    head = list(itertools.islice(iterator, 2))
    ahead = itertools.chain(head, iterator)
    if num_workers > 1 and len(head) > 1:
        yield from _in_processes(function, ahead, num_workers, remedy)
    else:
        yield from map(function, ahead)


def _in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int, remedy: str
) -> Iterator[Result]:
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, _start_method(), _start_worker, (function, os.getpid()))
    waiting: deque[concurrent.futures.Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_work, item))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(f"A tokenizing process was killed, perhaps because memory ran out. {remedy}") from error
    finally:
        pool.shutdown(cancel_futures=True)


_of_worker: dict[str, Callable[[Any], Any]] = {}


def _start_worker(function: Callable[[Any], Any], parent: int) -> None:
    """Leave interrupts to the process that started this one, and end when that one is killed."""
    _of_worker["function"] = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _work(item: Any) -> Any:
    return _of_worker["function"](item)


def _start_method() -> BaseContext:
    """Return how processes are started: forked, where that can be done.

    A forked process inherits its inputs and needs no ``if __name__ == "__main__"`` in the user's script.
    """
    return multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")


def _end_with(parent: int) -> None:
    """End this process when its parent was killed: nobody else would."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)

"""Count the words of a corpus that may be larger than memory, in parallel processes."""

import itertools
import json
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers import word_count_process
from lightning_lm.tokenizers.patterns import SplitPattern
from lightning_lm.tokenizers.streams import avoiding_special, read_text, rejoin
from lightning_lm.tokenizers.word_count_process import WordCounter

__all__ = ["Text", "count_words", "num_cores"]

Text = str | os.PathLike[str]
"""A document, or a UTF-8 text file that is read in blocks."""

_BATCH_CHARACTERS = 1 << 19
_WORTH_PROCESSES = 4 * _BATCH_CHARACTERS


def count_words(
    texts: Iterable[Text],
    pattern: SplitPattern,
    *,
    special_tokens: Sequence[str] = (),
    num_workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[bytes, int]:
    """Return how often each word occurs.

    Memory holds the distinct words and a few blocks of text, never the corpus.

    Args:
        texts: Documents, or paths of UTF-8 files. Words do not cross from one to the next.
        pattern: Regular expression that splits text into words.
        special_tokens: Strings that split the text and belong to no word.
        num_workers: Processes; by default one for each CPU core this process may use. Short corpora need none.
        on_progress: Called with the number of characters counted since the last call.

    Raises:
        TokenizerError: If a text is no Unicode text or a file is not UTF-8.
    """
    if isinstance(texts, str | os.PathLike):
        raise TokenizerError(f"Expected an iterable of texts, got one {type(texts).__name__}; put it into a list.")
    last_cut = avoiding_special(pattern.last_cut, special_tokens)
    batches = _batches(itertools.chain.from_iterable(_bounded(text, last_cut) for text in texts))
    workers = num_cores() if num_workers is None else num_workers
    description = (pattern.complete, pattern.ascii_expression, tuple(special_tokens))
    first = list(itertools.islice(batches, _WORTH_PROCESSES // _BATCH_CHARACTERS))
    all_batches = itertools.chain(first, batches)
    if workers > 1 and len(first) * _BATCH_CHARACTERS >= _WORTH_PROCESSES and sys.executable:
        counts = _count_in_processes(all_batches, description, workers, on_progress)
    else:
        counts = _count_here(all_batches, description, on_progress)
    return _encoded(counts)


def _bounded(text: Text, last_cut: Callable[[str], int]) -> Iterator[str]:
    """Yield a document whole, or a long one in parts that have the same words."""
    if not isinstance(text, str):
        return rejoin(read_text(text), last_cut, size=_BATCH_CHARACTERS)
    if len(text) <= _BATCH_CHARACTERS:
        return iter((text,))
    blocks = (text[i : i + _BATCH_CHARACTERS] for i in range(0, len(text), _BATCH_CHARACTERS))
    return rejoin(blocks, last_cut, size=_BATCH_CHARACTERS)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encoded(counts: dict[str, int]) -> dict[bytes, int]:
    try:
        return {word.encode(): count for word, count in counts.items()}
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"A text contains the lone surrogate U+{ord(error.object[error.start]):04X} in {error.object!r}, which is "
            "no character and has no UTF-8 form. Read files with encoding='utf-8', or drop it with "
            "text.encode('utf-8', 'ignore').decode()."
        ) from error


_Description = tuple[str, str, tuple[str, ...]]


def _count_here(
    batches: Iterable[list[str]], description: _Description, on_progress: Callable[[int], None] | None
) -> dict[str, int]:
    counter = WordCounter(*description)
    for batch in batches:
        counter.add(batch)
        _report(on_progress, sum(map(len, batch)))
    return counter.counts


def _count_in_processes(
    batches: Iterable[list[str]], description: _Description, workers: int, on_progress: Callable[[int], None] | None
) -> dict[str, int]:
    """Hand each batch to the next idle process; a few batches wait, so none of them idles and memory stays bounded."""
    with _Processes(description, workers) as processes, ThreadPoolExecutor(workers) as threads:
        waiting: deque[Future[int]] = deque()
        for batch in batches:
            waiting.append(threads.submit(processes.count, batch))
            if len(waiting) > 2 * workers:
                _report(on_progress, waiting.popleft().result())
        for future in waiting:
            _report(on_progress, future.result())
        return processes.collect()


def _report(on_progress: Callable[[int], None] | None, characters: int) -> None:
    if on_progress is not None:
        on_progress(characters)


class _Processes:
    """Word-counting processes; see `word_count_process`."""

    def __init__(self, description: _Description, workers: int) -> None:
        command = [sys.executable, "-P", word_count_process.__file__, json.dumps(description)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._all: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for _ in range(workers):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._all.append(process)
            self._idle.put(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._all:
            process.kill()
            process.communicate()

    def count(self, batch: list[str]) -> int:
        """Let the next idle process count a batch; return its size in characters."""
        process = self._idle.get()
        try:
            self._send(process, batch)
            self._receive(process, 1)
        finally:
            self._idle.put(process)
        return sum(map(len, batch))

    def collect(self) -> dict[str, int]:
        """Return the counts of all processes together."""
        for process in self._all:
            self._send(process, None)
        total: dict[str, int] = {}
        for process in self._all:
            assert process.stdout is not None
            counts = pickle.load(process.stdout)
            if not total:
                total = counts
                continue
            for word, count in counts.items():
                total[word] = total.get(word, 0) + count
        return total

    def _send(self, process: "subprocess.Popen[bytes]", message: object) -> None:
        assert process.stdin is not None
        try:
            pickle.dump(message, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended(process) from error

    def _receive(self, process: "subprocess.Popen[bytes]", size: int) -> None:
        assert process.stdout is not None
        if len(process.stdout.read(size)) < size:
            raise self._ended(process)

    @staticmethod
    def _ended(process: "subprocess.Popen[bytes]") -> TokenizerError:
        return TokenizerError(
            f"A word-counting process ended early (status {process.poll()}); its own message is above. It may have run "
            "out of memory: use fewer num_workers; num_workers=1 starts no process."
        )

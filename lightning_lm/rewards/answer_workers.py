"""Processes that compare answers and can be ended, kept for the next comparison."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import cache
from pathlib import Path

from lightning_lm.errors import LightningLMError

__all__ = ["START_S", "LineProcess", "compare_in_worker"]

_SCRIPT = Path(__file__).with_name("answer_worker.py")
START_S = 120.0
"""Seconds that the imports of a worker may take, on a machine that is busy."""


class LineProcess:
    """A process that answers each line with a line, and is ended when an answer takes too long.

    Args:
        process: Has pipes as standard input and output, without buffers, and is the first of its own process group.
    """

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def ask(self, line: bytes, time_s: float) -> bytes | None:
        """Return the answer to a line, or ``None`` if there is none in time; then the process is ended.

        Args:
            line: Without a line break. An empty one waits for what the process says unasked.
            time_s: Longest time. Seconds.
        """
        assert self._process.stdin is not None
        if line:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(line + b"\n")
        answer = self._line(time_s)
        if answer.endswith(b"\n"):
            return answer[:-1]
        self.end()
        return None

    def _line(self, time_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, line, deadline_s = self._process.stdout.fileno(), b"", time.monotonic() + time_s
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not line.endswith(b"\n"):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not poll.poll(left_s * 1000):
                break
            chunk = os.read(descriptor, 4096)
            if not chunk:
                break
            line += chunk
        return line

    def end(self) -> None:
        """End the process and those it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with self._process:  # closes the pipes and waits
            pass


def _start() -> LineProcess:
    search_path = [str(Path.cwd()) if entry == "" else entry for entry in sys.path]
    process = LineProcess(
        subprocess.Popen(
            [sys.executable, "-I", str(_SCRIPT), json.dumps(search_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
    )
    if process.ask(b"", START_S) != b"ready":
        raise LightningLMError(
            "The process that compares answers did not start; run "
            f"{sys.executable} {_SCRIPT} '[]' to see why, and report it."
        )
    return process


class _Workers:
    """Idle workers; as many are started as are needed at the same time. A forked process starts its own."""

    def __init__(self) -> None:
        self._process_id = os.getpid()
        self._idle: list[LineProcess] = []
        self._lock = threading.Lock()

    def compare(self, given: str, right: str, time_s: float) -> bool | None:
        with self._lock:
            if self._process_id != os.getpid():
                self._process_id, self._idle = os.getpid(), []
            worker = self._idle.pop() if self._idle else None
        worker = worker or _start()
        request = json.dumps({"given": given, "right": right, "time_s": time_s})
        answer = worker.ask(request.encode(), time_s)
        if answer is None:
            return False
        with self._lock:
            self._idle.append(worker)
        verdict: bool | None = json.loads(answer)
        return verdict


_WORKERS = _Workers()


@cache
def _warn_without_library() -> None:
    warnings.warn(
        "Some answers could not be read, and math-verify, which reads more, is not installed: they count as wrong. "
        'Install it with: pip install "lightning-lm[math]"',
        stacklevel=2,
    )


def compare_in_worker(given: str, right: str, *, time_s: float) -> bool:
    """Compare two answers by value in a process of its own; false if that takes too long.

    Args:
        given: Answer to score.
        right: The right answer.
        time_s: Longest time. Seconds.
    """
    verdict = _WORKERS.compare(given, right, time_s)
    if verdict is None:
        _warn_without_library()
    return bool(verdict)

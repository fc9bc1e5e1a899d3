"""Child processes of a road: their log, their cost, and signals that are passed on to them.

A child that outlives the road would still be writing when the road is started again: on Linux the system sends SIGTERM
to a child whose parent is gone, which makes ``fit`` save its last step and end.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from lightning_lm.errors import RunStopped

__all__ = ["Usage", "last_line", "run_process", "run_verb"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM) + ((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ())
_LOOK_S = 0.2
_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 20_000


class Usage(NamedTuple):
    """Cost of a process.

    Args:
        status: Exit status; that of a signal is negative.
        wall_s: Seconds.
        cpu_s: CPU-seconds, those of its processes included.
        memory_bytes: Largest resident memory of one of its processes; on Linux at least that of the process which
            starts it.
    """

    status: int
    wall_s: float
    cpu_s: float
    memory_bytes: int


Tick = Callable[[float, float], Any]
"""Function of the wall and CPU-seconds so far; called about five times a second."""


def run_verb(words: Sequence[str], log: Path, tick: Tick) -> Usage:
    """Run a verb of ``lightning-lm`` in a process of its own.

    Args:
        words: Words after the program's name.
        log: File to which its output is appended.
        tick: Function that is called meanwhile.
    """
    return run_process([sys.executable, "-m", "lightning_lm", *words], log, tick)


def run_process(command: Sequence[str], log: Path, tick: Tick) -> Usage:
    """Run a process to its end, and pass signals on to it.

    Args:
        command: Program and its arguments.
        log: File to which its output is appended.
        tick: Function that is called meanwhile.

    Raises:
        RunStopped: After its end, if this process has received a signal meanwhile.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start_s = time.monotonic()
    with log.open("ab") as output, _passed_on() as stop:
        output.write(f"\n$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, **_own_group()
        )
        try:
            usage = _watched(process, stop, lambda cpu_s: tick(time.monotonic() - start_s, cpu_s))
        except BaseException:
            process.terminate()
            process.wait()
            raise
    cpu_s, memory_bytes = usage
    if stop.signum:
        tick(time.monotonic() - start_s, cpu_s)
        raise RunStopped(stop.signum)
    return Usage(process.returncode, time.monotonic() - start_s, cpu_s, memory_bytes)


def last_line(log: Path) -> str:
    """Return the last line of a log that has any text, or that nothing has been printed since the command.

    Args:
        log: File.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return "no output"
    lines = [line.split("\r")[-1].strip() for line in text.splitlines()]
    last = next((line for line in reversed(lines) if line), "$ ")
    return "no output" if last.startswith("$ ") else last


class _Stop:
    """The signals that this process has received while a child runs."""

    def __init__(self) -> None:
        self.signum, self.waiting = 0, list[int]()

    def note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        self.waiting.append(signum)


@contextlib.contextmanager
def _passed_on() -> Iterator[_Stop]:
    stop, previous = _Stop(), {}
    try:
        with contextlib.suppress(ValueError):  # not the main thread: there are no signals for it
            for signum in _SIGNALS:
                previous[signum] = signal.signal(signum, stop.note)
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _watched(process: "subprocess.Popen[bytes]", stop: _Stop, tick: Callable[[float], Any]) -> tuple[float, int]:
    """Wait for a process; return its CPU-seconds and its largest memory."""
    while True:
        for signum in stop.waiting[:]:
            stop.waiting.remove(signum)
            # A hang-up is no signal that a run saves at.
            process.send_signal(signum if signum == signal.SIGINT else signal.SIGTERM)
        ended = _ended(process)
        if ended is not None:
            return ended
        tick(_cpu_s(process.pid))
        time.sleep(_LOOK_S)


def _ended(process: "subprocess.Popen[bytes]") -> tuple[float, int] | None:
    if not hasattr(os, "wait4"):  # Windows
        return None if process.poll() is None else (0.0, 0)
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if not pid:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    scale = 1 if sys.platform == "darwin" else 1024
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale


def _cpu_s(pid: int) -> float:
    """Return the CPU-seconds of a process and of its children that have ended; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0


def _own_group() -> dict[str, Any]:
    """Return options that keep the terminal's signals away, and that end the process when this one is killed.

    A Ctrl-C reaches the whole foreground group: the child would get it twice, and end without saving.
    """
    if os.name != "posix":
        return {}
    if not sys.platform.startswith("linux"):
        return {"start_new_session": True}
    libc, parent = ctypes.CDLL(None), os.getpid()

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return {"start_new_session": True, "preexec_fn": die_with_parent}

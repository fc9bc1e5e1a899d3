"""Processes that live for the whole test session and work together over gloo.

A fresh process costs seconds, a call to one that is there milliseconds. What is sent must be importable: functions and
classes at the top of a test module, which workers load from its file under the name that pytest gave it.
"""

import contextlib
import faulthandler
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

__all__ = ["WorkerError", "Workers", "hang"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.tensor", "lightning.pytorch"])
_START_TIMEOUT_S, _LEAVE_TIMEOUT_S, _STACK_TIMEOUT_S, _GROUP_TIMEOUT_S = 300.0, 30.0, 30.0, 900
_GRACE_S, _POLL_S = 0.5, 0.05
_TOLD = 4000
_HANGS, _MAIN_THREAD = "hangs", "Current thread"  # as faulthandler calls it


class WorkerError(Exception):
    """A rank raised, died or took too long. The message says which, and where it was."""


class _Rank(NamedTuple):
    process: Any
    pipe: Connection
    log: Path


class Workers:
    """As many ranks as asked for, started when they are first needed and again after a failure.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[_Rank] = []
        self._folder = Path(tempfile.mkdtemp(prefix=f"workers-{size}-"))

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 300.0, **kwargs: Any) -> list[Any]:
        """Call a function on every rank and return what each returned, in the order of ranks.

        Args:
            function: From the top of a module.
            *args: Sent by pickle, like all else.
            timeout_s: When a rank counts as hung.
            **kwargs: For the function too.

        Raises:
            WorkerError: If a rank raises, dies or hangs. The ranks are then ended, and new ones do the next call.
        """
        call = (*_modules_of(function), pickle.dumps((function, args, kwargs)))
        if not self._ranks:
            self._start()
        for rank in self._ranks:
            with contextlib.suppress(OSError):  # one that has died meanwhile shows below
                rank.pipe.send_bytes(pickle.dumps(call))
        return self._answers(time.monotonic() + timeout_s)

    def close(self) -> None:
        """Let the ranks leave together, and end those that do not."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.pipe.send_bytes(b"")
        deadline = time.monotonic() + _LEAVE_TIMEOUT_S
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
        self._end()

    def _start(self) -> None:
        for number in range(self.size):
            ours, theirs = _context.Pipe()
            log = self._folder / f"{number}.log"
            process = _context.Process(target=_serve, args=(number, self.size, theirs, log), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours, log))
        deadline = time.monotonic() + _START_TIMEOUT_S
        first, *others = self._ranks
        if first.pipe.poll(_START_TIMEOUT_S):
            with contextlib.suppress(OSError, EOFError):
                port = first.pipe.recv_bytes()
                for rank in others:
                    rank.pipe.send_bytes(port)
        self._answers(deadline)

    def _answers(self, deadline: float) -> list[Any]:
        """Wait until every rank has answered, or a short while longer than the first that fails or hangs."""
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(answers) + len(failures) < self.size and time.monotonic() < deadline:
            for number in self._ready(set(range(self.size)) - set(answers) - set(failures), deadline):
                worked, content = self._receive(number)
                if worked != _HANGS:
                    (answers if worked else failures)[number] = content
                if worked in (False, _HANGS):
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if len(answers) == self.size:
            return [answers[number] for number in range(self.size)]
        error = WorkerError(self._report(failures, set(range(self.size)) - set(answers) - set(failures)))
        self._end()
        raise error

    def _ready(self, waiting: set[int], deadline: float) -> list[int]:
        sources = {number: (self._ranks[number].pipe, self._ranks[number].process.sentinel) for number in waiting}
        found = wait([source for pair in sources.values() for source in pair], max(0.0, deadline - time.monotonic()))
        return sorted(number for number, pair in sources.items() if any(source in found for source in pair))

    def _receive(self, number: int) -> tuple[Any, Any]:
        rank = self._ranks[number]
        try:
            if rank.pipe.poll():
                worked, content = pickle.loads(rank.pipe.recv_bytes())
                return worked, content
        except (EOFError, OSError):
            rank.process.join(_LEAVE_TIMEOUT_S)
        return False, f"died (exit code {rank.process.exitcode})\n{_tail(rank.log)}"

    def _report(self, failures: dict[int, str], missing: set[int]) -> str:
        """Say what became of each rank that has not answered: the dead, those that raised, those still at work."""
        stacks = {number: self._stack(number) for number in sorted(missing)}
        ordered = sorted(
            failures, key=lambda number: (not failures[number].startswith("died"), list(failures).index(number))
        )
        lines = [f"rank {number} of {self.size} {failures[number]}" for number in ordered]
        word = "was still at work" if failures else "hung"
        lines += [f"rank {number} of {self.size} {word}\n{stack}" for number, stack in stacks.items()]
        return "\n".join(lines)

    def _stack(self, number: int) -> str:
        """Let a rank that is at work write down where; on a busy machine that may take a moment."""
        rank = self._ranks[number]
        with contextlib.suppress(OSError):
            os.kill(rank.process.pid, signal.SIGUSR2)
        deadline = time.monotonic() + _STACK_TIMEOUT_S
        while _MAIN_THREAD not in (log := _tail(rank.log, 10**9)) and time.monotonic() < deadline:
            rank.process.join(_POLL_S)
        rank.process.join(_POLL_S)  # the rest of it
        log = _tail(rank.log, 10**9)
        return log[max(0, min(log.rfind(_MAIN_THREAD), len(log) - _TOLD)) :]  # a deep stack may be long

    def _end(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
            rank.process.join()
            rank.pipe.close()
        self._ranks = []


def _modules_of(function: Callable[..., Any]) -> tuple[str, str | None]:
    """Return name and file of the module of a function, which a worker cannot find by its name."""
    module = sys.modules[function.__module__]
    return function.__module__, getattr(module, "__file__", None)


def _tail(log: Path, size: int = _TOLD) -> str:
    return log.read_text(errors="replace")[-size:] if log.exists() else ""


# --- what runs in a worker ---

_session = types.SimpleNamespace(pipe=None)


def hang() -> NoReturn:
    """Wait for ever and tell the session that this rank will, which then need not find out by ``timeout_s``."""
    _session.pipe.send_bytes(pickle.dumps((_HANGS, None)))
    while True:
        threading.Event().wait()


def _serve(rank: int, size: int, pipe: Connection, log: Path) -> None:
    """Answer calls until told to leave. Interpreters that used gloo may abort at their exit, so none takes place."""
    _redirect(log)
    _session.pipe = pipe
    for category in (DeprecationWarning, FutureWarning):  # as in pyproject.toml: our own calls
        warnings.filterwarnings("error", category=category, module="lightning_lm")
    try:
        worked, content = True, _join(rank, size, pipe)
    except BaseException:  # noqa: BLE001  it is told to the session
        worked, content = False, f"raised\n{traceback.format_exc()}"
    while True:
        try:
            pipe.send_bytes(pickle.dumps((worked, content)))
            call = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)  # the test session is gone
        if not call:
            _leave()
        worked, content = _call(*pickle.loads(call))


def _redirect(log: Path) -> None:
    stream = log.open("w", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = stream, stream
    faulthandler.enable(stream)
    faulthandler.register(signal.SIGUSR2, stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the session, which ends its workers


def _join(rank: int, size: int, pipe: Connection) -> None:
    """Form the process group; the first rank finds a free port and the session passes it on."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    address, timeout = "127.0.0.1", timedelta(seconds=_GROUP_TIMEOUT_S)
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    port = int(pipe.recv_bytes()) if rank else 0
    store = distributed.TCPStore(address, port, size, rank == 0, timeout, wait_for_workers=False)
    if not rank:
        pipe.send_bytes(str(store.port).encode())
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(store.port))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)


def _call(name: str, file: str | None, content: bytes) -> tuple[bool, Any]:
    environment, folder = dict(os.environ), Path.cwd()
    os.lseek(1, 0, os.SEEK_SET)  # the log begins anew
    os.ftruncate(1, 0)
    faulthandler.unregister(signal.SIGUSR2)  # a Trainer puts back handlers that it knows, and does not know this one
    faulthandler.register(signal.SIGUSR2, sys.stderr)
    try:
        _load(name, file)
        function, args, kwargs = pickle.loads(content)
        _seed()
        answer = True, function(*args, **kwargs)
        pickle.dumps(answer)
    except BaseException as error:  # noqa: BLE001  the same
        answer = False, f"raised {type(error).__name__}: {error}\n{traceback.format_exc()}"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return answer


def _load(name: str, file: str | None) -> None:
    """Import a module from its file under the name that it has in the session."""
    if name in sys.modules or file is None:
        return
    root = name.partition(".")[0]
    made_below = root in sys.modules and sys.modules[root].__spec__ is None  # for a module of another file
    if not made_below and importlib.util.find_spec(root) is not None:
        importlib.import_module(name)
        return
    parents = name.split(".")[:-1]
    for count in range(len(parents)):  # pickle imports them too
        parent = ".".join(parents[: count + 1])
        sys.modules.setdefault(parent, types.ModuleType(parent))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _seed() -> None:
    import torch

    torch.manual_seed(0)
    random.seed(0)


def _leave() -> None:
    from torch import distributed

    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)

"""Folders that one process at a time writes into."""

import contextlib
import importlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lightning_lm.errors import ConfigurationError

__all__ = ["held", "in_turn"]

_WAIT_S, _PAUSE_S = 60.0, 0.02

_open: set[int] = set()
_turn = threading.RLock()


@contextlib.contextmanager
def held(folder: Path, remedy: str) -> Iterator[None]:
    """Hold a folder until the block ends or the process does; a killed process lets go of it.

    The folder is made if needed, and removed again if the block leaves it empty. The lock is one of the folder itself,
    so nothing is left in it. Where the system has no ``flock`` for folders (Windows, some network file systems),
    nothing is held.

    Args:
        folder: The folder.
        remedy: Alternative to waiting for the process that holds it.

    Raises:
        ConfigurationError: If another process holds it; names that process.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        fcntl = importlib.import_module("fcntl")
        descriptor = os.open(folder, os.O_RDONLY)
    except (ModuleNotFoundError, PermissionError):
        yield
        return
    _open.add(descriptor)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigurationError(
                    f"{folder} is in use by {_holder(descriptor)}. Wait for its end, or {remedy}."
                ) from None
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        _open.discard(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Hold a folder for a moment, after the other processes and threads that do; see `held`.

    A folder that this process holds already need not be waited for.

    Args:
        folder: A folder that exists.

    Raises:
        ConfigurationError: If another process holds it for a minute; names that process.
    """
    with _turn, contextlib.ExitStack() as stack:
        end_s = time.monotonic() + _WAIT_S
        while not any(os.path.samestat(os.fstat(descriptor), folder.stat()) for descriptor in list(_open)):
            try:
                stack.enter_context(held(folder, "write elsewhere"))
            except ConfigurationError:
                if time.monotonic() > end_s:
                    raise
                time.sleep(_PAUSE_S)
            else:
                break
        yield


def _holder(descriptor: int) -> str:
    """Return the process that holds a lock, as far as the system tells."""
    inode = os.fstat(descriptor).st_ino
    try:
        locks = Path("/proc/locks").read_text().splitlines()
        pid = next(int(row.split()[4]) for row in locks if "FLOCK" in row and row.split()[5].endswith(f":{inode}"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(Path(f"/proc/{pid}").stat().st_mtime))
    except (OSError, StopIteration, ValueError):
        return "another process, perhaps on another machine"
    return f"process {pid} on {socket.gethostname()}, since {since}"


def _forget() -> None:
    """Close the folders in a forked process, which would hold them beyond the end of the one that does."""
    global _turn
    _turn = threading.RLock()  # a thread that the fork does not have may hold the other
    for descriptor in _open:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

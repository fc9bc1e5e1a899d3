"""Locks across processes, and across machines that share a file system: the system frees those of a killed process.

`locked` waits for a folder in which several processes prepare the same files, `held` refuses a folder that another
command is writing into. Without ``flock`` (Windows) nothing is locked.
"""

import contextlib
import importlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning_lm.errors import ConfigurationError

__all__ = ["held", "in_turn", "lock_file", "locked", "remove_abandoned"]

_ABANDONED_S = 86_400

_WAIT_S, _PAUSE_S = 60.0, 0.02

_open: set[int] = set()
_turn = threading.RLock()


def lock_file(descriptor: int, *, wait: bool = True) -> bool:
    """Lock an open file or folder until it is closed; return whether the system has such locks.

    Args:
        descriptor: File descriptor.
        wait: Wait until no other process has it locked.

    Raises:
        BlockingIOError: With ``wait=False``, if another process has it locked.
        OSError: If the file system has no locks.
    """
    try:
        fcntl = importlib.import_module("fcntl")
    except ModuleNotFoundError:  # Windows
        return False
    fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder, wait until no other process has it locked, and lock it by a file in it.

    Args:
        folder: Folder to lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        lock_file(file.fileno())
        yield


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove folders that no process has locked and that have not changed for a day, such as parts of a killed run.

    Args:
        folders: Folders that were made by `locked`.
    """
    for folder in folders:
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < _ABANDONED_S:
                continue
            with (folder / "lock").open("w") as file:
                if lock_file(file.fileno(), wait=False):
                    shutil.rmtree(folder)


@contextlib.contextmanager
def held(folder: Path, remedy: str) -> Iterator[None]:
    """Lock a folder, or refuse it if another process has it locked.

    The folder is made if needed, and removed again if the block leaves it empty. The lock is one of the folder itself,
    so nothing is left in it; a file system without such locks (some network file systems) locks nothing.

    Args:
        folder: Folder to lock.
        remedy: Alternative to waiting for the process that has it locked.

    Raises:
        ConfigurationError: If another process has it locked; names that process.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # also on Windows, which opens no folders
        yield
        return
    _open.add(descriptor)
    try:
        with contextlib.suppress(OSError):
            try:
                lock_file(descriptor, wait=False)
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
    """Return the process that has a file locked, as far as the system reports it."""
    inode = os.fstat(descriptor).st_ino
    try:
        locks = Path("/proc/locks").read_text().splitlines()
        pid = next(int(row.split()[4]) for row in locks if "FLOCK" in row and row.split()[5].endswith(f":{inode}"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(Path(f"/proc/{pid}").stat().st_mtime))
    except (OSError, StopIteration, ValueError):
        return "another process, perhaps on another machine"
    return f"process {pid} on {socket.gethostname()}, since {since}"


def _forget() -> None:
    """Close the folders in a forked process, which would lock them beyond the end of the one that does."""
    global _turn
    _turn = threading.RLock()  # a thread that the fork does not have may hold the other
    for descriptor in _open:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

"""Names of temporary files and folders that say who writes them, so that those of dead processes can be removed."""

import contextlib
import os
import shutil
import socket
import threading
import time
from pathlib import Path

__all__ = ["discard", "remove_leftovers", "temporary_for"]

_FOREIGN_AGE_S = 86_400
"""Age, seconds, at which a temporary of another machine is taken for left behind: its processes cannot be seen."""


def temporary_for(path: Path) -> Path:
    """Return the hidden name beside a path under which this thread writes what will take its place.

    Args:
        path: File or folder.
    """
    thread = "" if threading.current_thread() is threading.main_thread() else f"_{threading.get_ident()}"
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}{thread}.tmp")


def remove_leftovers(path: Path) -> None:
    """Remove the temporaries of processes that ended while they wrote to a path.

    Args:
        path: File or folder, as given to `temporary_for`.
    """
    prefix, suffix = f".{path.name}.", ".tmp"
    with contextlib.suppress(FileNotFoundError):
        for entry in path.parent.iterdir():
            if entry.name.startswith(prefix) and entry.name.endswith(suffix):
                writer = entry.name[len(prefix) : -len(suffix)]
                if _is_abandoned(entry, writer):
                    discard(entry)


def discard(path: Path) -> None:
    """Remove a file or folder if it is there.

    Args:
        path: File or folder.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_abandoned(entry: Path, writer: str) -> bool:
    machine, _, thread = writer.rpartition("-")
    process = thread.partition("_")[0]
    if not process.isdecimal():
        return False
    if machine in ("", _machine()):
        return int(process) != os.getpid() and not _is_alive(int(process))
    try:
        return time.time() - entry.lstat().st_mtime > _FOREIGN_AGE_S
    except FileNotFoundError:
        return False


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # a signal of 0 would end the process there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _machine() -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in socket.gethostname())

"""One process at a time in a folder, across processes and machines that share it."""

import contextlib
import importlib
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["locked", "remove_abandoned"]

_ABANDONED_S = 86_400


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and wait until no other process holds it. A process that is killed lets go of it.

    Where the system has no ``flock`` (Windows), nothing is waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        fcntl = importlib.import_module("fcntl")
    except ModuleNotFoundError:
        yield
        return
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove folders that no process holds and that have not changed for a day, such as parts of a killed run.

    Args:
        folders: Folders that were made by `locked`.
    """
    for folder in folders:
        with contextlib.suppress(OSError, ModuleNotFoundError):
            fcntl = importlib.import_module("fcntl")
            if time.time() - folder.stat().st_mtime < _ABANDONED_S:
                continue
            with (folder / "lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)

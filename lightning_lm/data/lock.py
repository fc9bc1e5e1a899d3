"""One process at a time in a folder, across processes and machines that share it."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["locked"]


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

"""Files that are replaced as a whole: a kill, a full disk or an error at any moment leaves the previous one."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from lightning_lm.storage.temporaries import remove_leftovers, temporary_for

__all__ = ["naming", "rename", "replacing", "sync_folder", "synced", "system_error"]


@contextlib.contextmanager
def replacing(path: Path, *, put: Callable[[Path, Path], None] | None = None) -> Iterator[BinaryIO]:
    """Open a file that takes the place of another one when all is written and on the disk.

    Args:
        path: The file to replace or create; its folder is made.
        put: Moves the temporary file to the path; by default `rename`, which replaces files only.

    Raises:
        OSError: If it cannot be written; has the path as ``filename``.
    """
    temporary = temporary_for(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        try:
            with synced(temporary) as file:
                yield file
            (put or rename)(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that is on the disk when the block ends.

    Args:
        path: File to write; readers may find a part of it meanwhile.
    """
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder in one step that survives a power cut; a file that is there is replaced.

    Args:
        source: File or folder whose content is on the disk.
        target: New path, on the same file system.
    """
    os.replace(source, target)
    sync_folder(target.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the file system a path: a write that fails has none, and torch wraps it in an error of its own.

    Args:
        path: The file or folder that is being written.

    Raises:
        OSError: What the system refused, for this path.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = system_error(error)
        if cause is None or (cause is error and cause.filename is not None):
            raise
        raise OSError(cause.errno, cause.strerror, os.fspath(path)) from error


def system_error(error: BaseException) -> OSError | None:
    """Return the refusal of the file system behind an error, however deep it is wrapped.

    Args:
        error: As it was raised.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can.

    Args:
        folder: The folder.
    """
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

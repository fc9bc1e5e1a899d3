"""Digests of the files of a folder, in a file that ``sha256sum --check`` reads too."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from lightning_lm.errors import CheckpointError
from lightning_lm.storage.replacing import replacing
from lightning_lm.storage.switch import SWITCH, verifies

__all__ = ["DIGESTS", "SHARDED_DIGESTS", "check_digests", "file_state", "write_digests"]

DIGESTS = "SHA256SUMS"
"""Name of the file: one line a file, its SHA-256 and its name."""
SHARDED_DIGESTS = "digests.json"
"""Name in folders that the strategies of this package save; Lightning's have none."""
_PIECE = 1 << 20

_sound: dict[str, tuple[str, tuple[int, int, int]]] = {}
"""Digests of files as this process has found them, with their state then."""


def file_state(path: Path) -> tuple[int, int, int]:
    """Return size, time of modification and time of change of a file: equal if nobody has written to it since.

    Args:
        path: The file.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def write_digests(folder: Path, names: Iterable[str]) -> None:
    """Write the digests of files; those of other files that a folder has already stay.

    Args:
        folder: The folder.
        names: Files in it, which are complete.
    """
    known = {name: digest for name, digest in _read(folder).items() if (folder / name).is_file()}
    known.update({name: _digest(folder / name) for name in names})
    with replacing(folder / DIGESTS) as file:
        file.write("".join(f"{known[name]}  {name}\n" for name in sorted(known)).encode())


def check_digests(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files with their digests, in constant memory. Files without one are taken as they are.

    Args:
        folder: The folder; one that others wrote has no digests.
        names: Files to compare, as far as they are there; ``None`` for all of the folder.

    Raises:
        CheckpointError: If a file has changed since it was written.
    """
    if not verifies():
        return
    known = _read(folder)
    for name in known if names is None else [name for name in names if name in known]:
        path = folder / name
        if path.is_file() and _digest(path) != known[name]:
            raise CheckpointError(
                f"{path} has changed since it was written: its SHA-256 is not that in {folder / DIGESTS}. Write the "
                f"folder again, or copy it from a place where it is intact. If the change is meant: rm "
                f"{folder / DIGESTS}; {SWITCH}=0 in the environment passes over all digests."
            )


def _digest(path: Path) -> str:
    key, state = os.fspath(path.absolute()), file_state(path)
    if key in _sound and _sound[key][1] == state:
        return _sound[key][0]
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    _sound[key] = digest.hexdigest(), state
    return digest.hexdigest()


def _read(folder: Path) -> dict[str, str]:
    """Return digests by the name of the file; lines of another form have no meaning here."""
    try:
        lines = (folder / DIGESTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    pairs = [line.split(maxsplit=1) for line in lines]
    return {
        pair[1].removeprefix("*"): pair[0].lower()
        for pair in pairs
        if len(pair) == 2 and len(pair[0]) == 64 and "/" not in pair[1]
    }

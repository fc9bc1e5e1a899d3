"""Digests of the files of a sharded checkpoint, written beside them when it is saved and compared when it is loaded."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_lm.errors import CheckpointError
from lightning_lm.storage import SHARDED_DIGESTS, SWITCH, verifies
from lightning_lm.storage.json_text import parse_json

__all__ = ["FILE", "as_file", "check_folder", "digests_of", "take_as_sound"]

FILE = SHARDED_DIGESTS
"""Name of the file in the folder."""
_VERSION = 1
_sound: set[tuple[str, int, int, int]] = set()
"""Files that this process has found sound, as they were then."""

Digest = dict[str, Any]
"""Size in bytes and SHA-256 of a file."""


def digests_of(files: Iterable[Path]) -> dict[str, Digest]:
    """Return the digests of files by name.

    Args:
        files: Complete files.
    """
    return {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}


def as_file(digests: Mapping[str, Digest]) -> bytes:
    """Return the content of the file with the digests of all others.

    Args:
        digests: By name.
    """
    return json.dumps({"version": _VERSION, "files": dict(sorted(digests.items()))}, indent=1).encode()


def check_folder(folder: Path | str, *, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a folder with their digests. Folders without digests were written by earlier versions.

    Args:
        folder: The folder.
        part: Index of the part of the files to look at; existence and sizes of all are compared.
        parts: Number of parts.

    Raises:
        CheckpointError: If a file is missing, truncated or damaged; names it.
    """
    folder = Path(folder)
    if not verifies() or not (folder / FILE).is_file():
        return
    for index, (name, digest) in enumerate(_known(folder).items()):
        file = folder / name
        if not file.is_file():
            raise _error(file, "is missing: the folder was copied in part, or a file was removed")
        if file.stat().st_size != digest["bytes"]:
            raise _error(file, f"has {file.stat().st_size:,} bytes and was written with {digest['bytes']:,}")
        if index % parts == part and _status(file) not in _sound:
            if _sha256(file) != digest["sha256"]:
                raise _error(file, "is damaged: its content is not what was written (SHA-256)")
            _sound.add(_status(file))


def take_as_sound(folder: Path | str) -> None:
    """Remember that all files of a folder were found sound, each by one of the ranks.

    Args:
        folder: The folder.
    """
    _sound.update(_status(file) for file in Path(folder).iterdir())


def _known(folder: Path) -> dict[str, Digest]:
    try:
        files = parse_json((folder / FILE).read_bytes())["files"]
        known = {str(name): {"bytes": int(entry["bytes"]), "sha256": entry["sha256"]} for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _error(folder / FILE, "is damaged, so that nothing can be compared with it") from error
    for name in known:
        if Path(name).name != name:
            raise _error(folder / FILE, f"is damaged: it names {name!r}, which is no file of the folder")
    return known


def _status(file: Path) -> tuple[str, int, int, int]:
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _error(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file} {what}. Use an earlier checkpoint of the run (often in the same folder), or copy it again from a "
        f"place where it is intact. With the environment variable {SWITCH}=0 digests are not compared."
    )

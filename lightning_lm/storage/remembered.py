"""Memory of which files were compared with their digests: large ones are read once, until somebody writes to them."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from lightning_lm.storage.cache import cache_folder
from lightning_lm.storage.digests import file_state
from lightning_lm.storage.json_text import parse_json
from lightning_lm.storage.replacing import replacing

__all__ = ["is_remembered", "remember"]

_NAME = "compared.json"

_compared: dict[str, dict[str, list[int]]] = {}
"""States of the files of folders that this process has compared."""


def is_remembered(folder: Path, names: Sequence[str]) -> bool:
    """Return whether files were compared and have the same size and times since.

    Args:
        folder: The folder.
        names: Files in it.
    """
    states = _states(folder, names)
    return _compared.get(str(folder.absolute())) == states or any(_read(path) == states for path in _notes(folder))


def remember(folder: Path, names: Sequence[str]) -> None:
    """Note the states of files: in their folder, or in the user's cache if the folder cannot be written.

    Args:
        folder: The folder.
        names: Files in it, which were compared or have just been written.
    """
    states = _compared[str(folder.absolute())] = _states(folder, names)
    for path in _notes(folder):
        with contextlib.suppress(OSError):  # then the files are compared again at the next opening
            with replacing(path) as file:
                file.write(json.dumps(states).encode())
            return


def _states(folder: Path, names: Sequence[str]) -> dict[str, list[int]]:
    return {name: list(file_state(folder / name)) for name in names}


def _notes(folder: Path) -> tuple[Path, Path]:
    key = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:32]
    return folder / _NAME, cache_folder() / "compared" / f"{key}.json"


def _read(path: Path) -> object:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None

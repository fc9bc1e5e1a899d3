"""The text files behind the paths that a user names."""

import codecs
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning_lm.errors import DataError

__all__ = ["find_text_files"]

_SNIFFED_BYTES = 1 << 16


def find_text_files(paths: Iterable[Path | str]) -> Iterator[Path]:
    """Yield text files: those named, and those in folders, at any depth and in the order of their names.

    Hidden files and files that do not look like UTF-8 text are left out of folders. A file that is named is not judged.

    Raises:
        DataError: If a path does not exist.
    """
    for path in map(Path, paths):
        if path.is_dir():
            yield from filter(_looks_like_text, _files_in(path))
        elif path.exists():
            yield path
        else:
            raise DataError(f"There is no file or folder {path}.")


def _files_in(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _looks_like_text(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(_SNIFFED_BYTES)
    try:
        # Only where the file goes on may the last character be cut.
        codecs.getincrementaldecoder("utf-8")().decode(beginning, final=len(beginning) < _SNIFFED_BYTES)
    except UnicodeDecodeError:
        return False
    return b"\0" not in beginning

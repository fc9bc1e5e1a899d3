"""The corpus that every machine with Python already has: the sources of its standard library."""

import dataclasses
import functools
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from lightning_lm.data.sources import Source, digest_of_files
from lightning_lm.errors import DataError

__all__ = ["StandardLibrary"]

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary(Source):
    """Every module of the running Python's standard library except its tests, one document each.

    About 10 MB of clean code that needs no download: enough to see a language model learn.
    """

    def documents(self) -> Iterator[str]:
        """Yield the source of each module, in the order of the paths.

        Raises:
            DataError: If this Python comes without the sources.
        """
        for _, text in self.modules():
            yield text

    def modules(self) -> Iterator[tuple[str, str]]:
        """Yield the dotted name and the source of each module, in the order of the paths.

        Raises:
            DataError: If this Python comes without the sources.
        """
        for path in self._paths():
            try:
                with tokenize.open(path) as file:
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue  # Names an encoding that it does not have: no module of Python's own.
            if text:
                parts = path.relative_to(_root()).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), text

    @property
    def fingerprint(self) -> str | None:
        """Digest of the Python version and of the modules' names, sizes and times of change."""
        return _fingerprint()

    @property
    def num_bytes(self) -> int | None:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self._paths())

    def _paths(self) -> list[Path]:
        root = _root()
        paths = sorted(_modules(root))
        if not paths:
            raise DataError(
                f"This Python has no library sources under {root}. Pass your own text: train=<file or folder>."
            )
        return paths


@functools.cache  # a data module asks eight times, and the sources of a running Python stay
def _fingerprint() -> str:
    return digest_of_files(StandardLibrary()._paths(), _root(), sys.version)


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))

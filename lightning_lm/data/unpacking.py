"""The bytes of a file, unpacked if it is compressed: gzip, Zstandard, xz and bzip2, told apart by their content.

Each compressed stream is followed to its end mark, so a file that was cut short is an error and never half a text.
"""

import bz2
import importlib
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_lm.errors import DataError, MissingDependencyError

__all__ = ["import_optional", "packing_of", "read_blocks", "read_start"]

_BLOCK = 1 << 20
_PACKED_BLOCK = 1 << 16
"""Bytes that are unpacked at once: a block of a well packed text is a hundred times as large."""
_START = 1 << 16

_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_BZIP2 = (b"1AY&SY", b"\x17rE8P\x90")


def packing_of(start: bytes) -> str | None:
    """Return how a file is compressed, judged by its first bytes: ``"gzip"``, ``"zstd"``, ``"xz"``, ``"bzip2"``.

    Args:
        start: At least the first ten bytes.
    """
    if start.startswith(b"\x1f\x8b"):
        return "gzip"
    if start.startswith(b"\x28\xb5\x2f\xfd") or (start[1:4] == b"\x2a\x4d\x18" and start[0] >> 4 == 5):
        return "zstd"
    if start.startswith(b"\xfd7zXZ\0"):
        return "xz"
    return "bzip2" if start.startswith(b"BZh") and start[4:10] in _BZIP2 else None


def read_blocks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file in blocks, unpacked.

    Args:
        path: A compressed file, or any other.

    Raises:
        DataError: If the file cannot be read, is damaged, or was cut short.
        MissingDependencyError: If it is compressed with Zstandard and ``zstandard`` is not installed.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_PACKED_BLOCK)
            packing, named = packing_of(start), _SUFFIXES.get(path.suffix.lower())
            if packing is None and named is not None:
                raise _damaged(path, f"it does not begin as {named} does")
            size = _BLOCK if packing is None else _PACKED_BLOCK
            blocks = itertools.chain([start], iter(lambda: file.read(size), b""))
            yield from filter(None, blocks if packing is None else _unpacked(blocks, packing, path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_start(path: Path) -> tuple[bytes, bool]:
    """Return the first 64 KiB of a file, unpacked, and whether that is all of it.

    Args:
        path: A compressed file, or any other.

    Raises:
        DataError: If the file cannot be read, or is damaged there.
    """
    start = b""
    for block in read_blocks(path):
        start += block
        if len(start) > _START:
            return start[:_START], False
    return start, True


def _unpacked(blocks: Iterable[bytes], packing: str, path: Path) -> Iterator[bytes]:
    """Unpack streams that follow each other; zero bytes between them are padding."""
    new, damage = _decompressor(packing, path)
    decompressor: Any = None
    try:
        for data in blocks:
            while data:
                decompressor = decompressor or new()
                yield decompressor.decompress(data)
                if not decompressor.eof:
                    break
                data, decompressor = decompressor.unused_data.lstrip(b"\0"), None
    except damage as error:
        raise _damaged(path, str(error)) from error
    if decompressor is not None:
        raise _damaged(path, "it ends in the middle")


def _decompressor(packing: str, path: Path) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    if packing == "gzip":
        return lambda: zlib.decompressobj(31), (zlib.error,)
    if packing == "xz":
        return lzma.LZMADecompressor, (lzma.LZMAError,)
    if packing == "bzip2":
        return bz2.BZ2Decompressor, (OSError, ValueError)
    zstandard = import_optional("zstandard", f"read {path.name}")
    # Files that were packed with `zstd --long` need a window of up to 2 GiB.
    return lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(), (zstandard.ZstdError,)


def import_optional(package: str, purpose: str, extra: str = "files") -> Any:
    """Return a package that only some files need.

    Args:
        package: Its name.
        purpose: Purpose of the package, as the end of "... is needed to".
        extra: The extra of ``lightning-lm`` that brings it.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(package.partition(".")[0], purpose, extra=extra) from error


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged or of another kind than its name ({reason}); fetch or compress it again.")

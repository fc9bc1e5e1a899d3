"""Places of records in a web archive, for reading on after a damaged one and for reading an archive in parts."""

import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["find_record", "is_divisible", "is_whole_record"]

_BLOCK = 1 << 20
_GZIP = b"\x1f\x8b\x08"
_NAME = b"WARC/"
_HEAD = 1 << 16
_LENGTH = re.compile(rb"^content-length:\s*(\d+)\s*$", re.IGNORECASE | re.MULTILINE)


def find_record(file: BinaryIO, position: int) -> int | None:
    """Return the position of the first record at or after a position, ``None`` if there is none.

    Args:
        file: An archive of plain records, or of a gzip member for each record.
        position: Byte from which on to look.
    """
    file.seek(0)
    mark = _GZIP if file.read(3) == _GZIP else _NAME
    for place in _occurrences(file, mark, position):
        file.seek(max(0, place - 1))
        before = file.read(1) if place else b"\n"
        if mark == _NAME and before == b"\n":
            return place
        if mark == _GZIP and _start(file, place, len(_NAME)) == _NAME:
            return place
    return None


def is_whole_record(file: BinaryIO, position: int) -> bool:
    """Tell whether the record at a position ends where its length says.

    Args:
        file: The archive.
        position: Position of the record.
    """
    head = _start(file, position, _HEAD)
    end, found = head.find(b"\r\n\r\n"), _LENGTH.search(head)
    if end < 0 or found is None or found.start() > end:
        return False
    size = end + 4 + int(found[1])
    return size < 1 << 30 and _start(file, position, size + 4)[size:] == b"\r\n\r\n"


def is_divisible(file: BinaryIO) -> bool:
    """Tell whether an archive can be read from its middle: plain, or with a gzip member for each record.

    Args:
        file: The archive; of a compressed one the first record is looked at.
    """
    head = _start(file, 0, _HEAD)
    end, found = head.find(b"\r\n\r\n"), _LENGTH.search(head)
    if end < 0 or found is None or not is_whole_record(file, 0):
        return False
    size = end + 4 + int(found[1]) + 4
    file.seek(0)
    return file.read(3) != _GZIP or len(_start(file, 0, size + 1)) == size


def _start(file: BinaryIO, position: int, size: int) -> bytes:
    """Return the first bytes of a record, unpacked."""
    file.seek(position)
    start = file.read(3)
    file.seek(position)
    if start != _GZIP:
        return file.read(size)
    unpacker, parts, missing = zlib.decompressobj(31), list[bytes](), size
    try:
        while missing and not unpacker.eof and (data := unpacker.unconsumed_tail or file.read(1 << 14)):
            parts.append(unpacker.decompress(data, missing))
            missing -= len(parts[-1])
    except zlib.error:
        pass
    return b"".join(parts)


def _occurrences(file: BinaryIO, mark: bytes, position: int) -> Iterator[int]:
    tail = b""
    while True:
        file.seek(position + len(tail))
        block = file.read(_BLOCK)
        data = tail + block
        place = data.find(mark)
        while place >= 0:
            yield position + place
            place = data.find(mark, place + 1)
        if not block:
            return
        tail = data[-(len(mark) - 1) :]
        position += len(data) - len(tail)

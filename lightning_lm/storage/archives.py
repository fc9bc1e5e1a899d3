"""Checksums of the records in a file that ``torch.save`` wrote.

Such a file is a zip archive without compression and has a CRC-32 of each record, which torch writes and never reads.
Python's ``zipfile`` compares it too, but at a third of the speed: here a record is read in large pieces.
"""

import errno
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from lightning_lm.errors import CheckpointError
from lightning_lm.storage.switch import SWITCH, verifies

__all__ = ["check_archive"]

_PIECE = 1 << 20
_IS_FOLDER = 0x10
_LOCAL_HEADER = struct.Struct("<4s22xHH")

_sound: set[tuple[str, int, int, int]] = set()
"""Files that this process has found sound, as they were then."""


def check_archive(path: Path | str) -> None:
    """Compare every record of a file with its checksum, in constant memory. Older formats of torch have none.

    Args:
        path: A file that ``torch.save`` wrote.

    Raises:
        CheckpointError: If a record has changed since it was written; names the record and its place.
    """
    status = os.stat(path)
    seen = (os.fspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if seen in _sound or not verifies():
        return
    try:
        if not zipfile.is_zipfile(path):
            _refuse_truncated(path)
            return
        with zipfile.ZipFile(path) as archive, open(path, "rb", buffering=0) as file:
            for record in archive.infolist():
                _check_record(file, record, path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        if isinstance(error, CheckpointError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        raise _damaged(path, f"its table of contents cannot be read ({error})") from error
    _sound.add(seen)


def _refuse_truncated(path: Path | str) -> None:
    """Refuse an archive without the table of contents that stands at its end; other formats are left to torch."""
    with open(path, "rb") as file:
        if file.read(4) == zipfile.stringFileHeader:  # type: ignore[attr-defined]
            raise _damaged(path, "it is truncated, the table of contents at its end is missing")


def _check_record(file: BinaryIO, record: zipfile.ZipInfo, path: Path | str) -> None:
    file.seek(record.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    begins = header[:4] == zipfile.stringFileHeader and len(header) == _LOCAL_HEADER.size  # type: ignore[attr-defined]
    _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header) if begins else (b"", 0, 0)
    name = file.read(name_bytes)
    stored = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
    if not begins or name != record.filename.encode() or not stored or record.external_attr & _IS_FOLDER:
        raise _damaged(path, f"the header of {record.filename} at byte {record.header_offset:,} has changed")
    begin = file.seek(extra_bytes, os.SEEK_CUR)
    checksum, left, piece = 0, record.file_size, memoryview(bytearray(_PIECE))
    while left and (count := file.readinto(piece[: min(left, _PIECE)])):  # type: ignore[attr-defined]
        checksum, left = zlib.crc32(piece[:count], checksum), left - count
    if left or checksum != record.CRC:
        raise _damaged(
            path,
            f"{record.filename}, bytes {begin:,} to {begin + record.file_size:,}, does not have the checksum that it "
            "was written with",
        )


def _damaged(path: Path | str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {what}. Use an earlier checkpoint of the run (often in the same folder), or copy it again "
        f"from a place where it is intact. With the environment variable {SWITCH}=0 it is read as it is."
    )

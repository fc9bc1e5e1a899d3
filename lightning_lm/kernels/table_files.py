"""Files of tuned launch settings: what an entry says, how a file is read and checked; written whole or not at all."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_lm.errors import DataError
from lightning_lm.storage import replacing, verifies

__all__ = ["Entry", "Key", "read_table", "write_table"]

_FORMAT = 1
Key = tuple[str, str, tuple[int, ...], str, str]
"""Device, operation, sizes, type of numbers, and Triton's version to the minor."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Launch settings that were measured to be fast.

    Args:
        device: Name of the device, as its driver gives it.
        operation: Name of the kernel.
        dims: The sizes that its speed depends on.
        dtype: Data type of its main operand, such as ``bfloat16``.
        triton: Version to the minor.
        settings: Launch settings of the kernel.
        before_us: Time with the settings before, in microseconds.
        after_us: Time with these.
        torch: Version.
        date: Date of the measurement, ``YYYY-MM-DD``.
    """

    device: str
    operation: str
    dims: tuple[int, ...]
    dtype: str
    triton: str
    settings: dict[str, int]
    before_us: float
    after_us: float
    torch: str
    date: str

    @property
    def key(self) -> Key:
        """Key of the entry."""
        return self.device, self.operation, self.dims, self.dtype, self.triton


def read_table(path: Path) -> list[Entry]:
    """Return the entries of a file.

    Args:
        path: A file that `write_table` wrote.

    Raises:
        DataError: If it cannot be read, is of another format, or an entry is not what a kernel could be launched with.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if (
        not isinstance(content, dict)
        or content.get("format") != _FORMAT
        or not isinstance(content.get("entries"), list)
    ):
        found = content.get("format") if isinstance(content, dict) else None
        raise DataError(f"{path} is not a table of kernels of format {_FORMAT} (it says {found!r})")
    if verifies() and content.get("sha256") not in (None, _digest(content["entries"])):
        raise DataError(
            f"{path} has changed since it was written. Measure again (lightning-lm kernels), or take its sha256 out if "
            "the change is meant."
        )
    return [_entry(path, number, values) for number, values in enumerate(content["entries"], 1)]


def write_table(path: Path, entries: Iterable[Entry]) -> None:
    """Write entries to a file, which is replaced as a whole.

    Args:
        path: The file; its folder is made.
        entries: Entries to write, in any order.
    """
    rows = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.key)]
    lines = ",".join(f"\n {json.dumps(row)}" for row in rows)
    text = f'{{"format": {_FORMAT}, "sha256": "{_digest(rows)}", "entries": [{lines}\n]}}\n'
    with replacing(path) as file:
        file.write(text.encode())


def _digest(rows: list[Any]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _entry(path: Path, number: int, values: Any) -> Entry:
    try:
        entry = Entry(**{**values, "dims": tuple(values["dims"])})
    except (TypeError, KeyError) as error:
        raise DataError(f"{path}, entry {number}: {error}") from None
    texts: Sequence[Any] = (entry.device, entry.operation, entry.dtype, entry.triton)
    if not all(isinstance(text, str) for text in texts) or not all(map(_is_size, entry.dims)):
        raise DataError(
            f"{path}, entry {number}: {entry.key} does not name a device, a kernel, sizes, a type, a version"
        )
    wrong = (
        not isinstance(entry.settings, dict) or not entry.settings or not all(map(_is_size, entry.settings.values()))
    )
    if wrong or any(not _may_be(name, size) for name, size in entry.settings.items()):
        raise DataError(f"{path}, entry {number}: {entry.operation} cannot be launched with {entry.settings}")
    return entry


def _is_size(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _may_be(name: Any, size: int) -> bool:
    """Return whether a setting may have a value: sizes of tiles and numbers of warps are powers of two."""
    return isinstance(name, str) and (name in ("PROGRAMS", "num_stages") or size & (size - 1) == 0)

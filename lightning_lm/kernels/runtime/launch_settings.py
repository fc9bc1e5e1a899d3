"""Launch settings of the kernels: looked up, never measured while a model trains.

Measuring at run time needs a driver, spends live data, and may end differently on every rank. So tables are measured
once, by ``lightning-lm kernels tune``, and read at the first launch. What is in none of them is launched by the rule of
its kernel. The first table that knows a kernel, its sizes and the device wins:

1. the one given to `use_table`, or else the one that ``LIGHTNING_LM_KERNEL_TABLE`` names;
2. ``lightning-lm/kernels.json`` in the user's cache folder (``XDG_CACHE_HOME``, ``~/.cache``): the command writes it;
3. ``tables.json``, which comes with the package.

A table that cannot be read, or that is of another version of Triton, is named in a warning and ignored.
"""

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_lm.errors import DataError
from lightning_lm.kernels.runtime.launch import triton_version
from lightning_lm.storage import cache_folder, replacing, verifies
from lightning_lm.storage.json_text import parse_json

__all__ = [
    "VARIABLE",
    "Entry",
    "Key",
    "Source",
    "Trial",
    "device_name",
    "read_table",
    "settings",
    "sources",
    "trial",
    "use_table",
    "user_table",
    "write_table",
]

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
        content = parse_json(path.read_text(encoding="utf-8"))
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


VARIABLE = "LIGHTNING_LM_KERNEL_TABLE"
"""Names a table in the environment."""
_SHIPPED = Path(__file__).with_name("tables.json")
_given: list[Path] = []
_trials: "list[Trial]" = []


@dataclass(frozen=True)
class Source:
    """A table, and what became of it."""

    path: Path
    entries: list[Entry] = field(default_factory=list)
    """Those for this version of Triton."""
    problem: str = ""
    """Reason why all or some of it is ignored."""


@dataclass
class Trial:
    """Settings that are tried for a kernel instead of those of tables; without any, what would be launched."""

    operation: str
    settings: Mapping[str, int] | None = None
    launched: dict[str, int] = field(default_factory=dict)
    """Launch settings that were used."""


def settings(
    operation: str, dims: tuple[int, ...], dtype: torch.dtype, *, device: torch.device, default: Mapping[str, int]
) -> dict[str, int]:
    """Return the launch settings of a kernel: its own, overridden by the first table that has an entry.

    Args:
        operation: Name of the kernel.
        dims: The sizes that its speed depends on.
        dtype: Data type of its main operand.
        device: Device on which it runs.
        default: Settings of its rule.
    """
    tried = next((one for one in _trials if one.operation == operation), None)
    if tried is not None and tried.settings is not None:
        found: Mapping[str, int] = tried.settings
    else:
        found = _tuned(operation, dims, dtype, device, frozenset(default))
    chosen = {**default, **found}
    if tried is not None:
        tried.launched = dict(chosen)
    return chosen


@contextlib.contextmanager
def trial(operation: str, settings: Mapping[str, int] | None = None) -> Iterator[Trial]:
    """Launch a kernel with given settings, and see with which it is launched.

    Args:
        operation: Name of the kernel.
        settings: Instead of those of tables; ``None`` changes nothing.
    """
    _trials.append(tried := Trial(operation, settings))
    try:
        yield tried
    finally:
        _trials.remove(tried)


def use_table(path: Path | str | None) -> None:
    """Look up launch settings in a table before all others; for this process.

    Args:
        path: Output of ``lightning-lm kernels tune --output``; ``None`` for the usual order.
    """
    _given[:] = [] if path is None else [Path(path)]
    sources.cache_clear()
    _entries.cache_clear()
    _tuned.cache_clear()


def user_table() -> Path:
    """Return where the user's own table is: in the cache folder."""
    return cache_folder() / "kernels.json"


@functools.cache
def device_name(device: torch.device) -> str:
    """Return the name that tables are kept for, such as ``"NVIDIA H100 80GB HBM3"``; ``"interpreter"`` without a GPU.

    Args:
        device: Device on which the kernel runs.
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@functools.cache
def sources() -> tuple[Source, ...]:
    """Return the tables in the order in which they are asked; those with a problem are named in a warning, once."""
    named = [*_given] or [Path(name) for name in (os.environ.get(VARIABLE),) if name]
    found = [_source(path) for path in named]
    found += [_source(path) for path in (user_table(), _SHIPPED) if path.is_file()]
    for source in found:
        if source.problem:
            warnings.warn(f"{source.problem}. It is ignored; `lightning-lm kernels tune` writes another.", stacklevel=2)
    return tuple(found)


def _source(path: Path) -> Source:
    try:
        entries = read_table(path)
    except DataError as error:
        return Source(path, problem=f"The table of kernels {error}")
    current = [entry for entry in entries if entry.triton == triton_version()]
    if len(current) == len(entries) or path == _SHIPPED:  # what is shipped may be for several versions
        return Source(path, current)
    others = ", ".join(sorted({entry.triton for entry in entries} - {triton_version()}))
    number = f"{len(entries) - len(current)} of its {len(entries)} entries are"
    return Source(
        path, current, f"The table of kernels {path} is stale: {number} of Triton {others}, not {triton_version()}"
    )


@functools.cache
def _entries() -> dict[tuple[str, str, tuple[int, ...], str], tuple[Path, Entry]]:
    """Return all entries; of two for the same, the one of the table that is asked first."""
    return {entry.key[:4]: (source.path, entry) for source in reversed(sources()) for entry in source.entries}


@functools.cache
def _tuned(
    operation: str, dims: tuple[int, ...], dtype: torch.dtype, device: torch.device, names: frozenset[str]
) -> dict[str, int]:
    """Return what the tables say about a launch, unless the kernel does not know such settings."""
    key = device_name(device), operation, dims, str(dtype).removeprefix("torch.")
    if key not in _entries():
        return {}
    path, entry = _entries()[key]
    known = names | {"num_stages"} | ({"PROGRAMS"} if operation.endswith("_backward") else set())
    unknown = sorted(set(entry.settings) - known)
    if unknown:
        text = f"{path}: {operation} takes no setting {unknown[0]!r}; its entry for {dims} is stale and ignored."
        warnings.warn(text, stacklevel=2)
        return {}
    return entry.settings

"""The splits of an evaluation set on disk: as it is published, as the Hugging Face Hub has it, or as one file."""

import re
from collections.abc import Sequence
from pathlib import Path

from lightning_lm.data.formats import RECORDS, format_of
from lightning_lm.data.paths import find_files, roots_of
from lightning_lm.errors import DataError

__all__ = ["find_split", "task_folder"]

_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "development"),
    "dev": ("dev", "development"),
    "test": ("test", "testing"),
}
_SPLIT_NAMES = {name for names in _NAMES.values() for name in names}
_FORMATS = re.compile(r"\.(?:jsonl?|ndjson|csv|tsv|parquet|arrow|txt)(?:\.(?:gz|bz2|xz|zst))?$")
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


def task_folder(data: str, names: Sequence[str]) -> Path:
    """Return the folder of a task: that of one of its names below a folder of several, or the folder itself.

    Args:
        data: A file or folder.
        names: Names of the task's own folder, in the order of preference.

    Raises:
        DataError: If there is no such file or folder.
    """
    (root, *_) = roots_of(data)
    below = {path.name.lower(): path for path in sorted(root.iterdir())} if root.is_dir() else {}
    return next((below[name.lower()] for name in names if name.lower() in below), root)


def find_split(root: Path, split: str, *, subset: Sequence[str] = (), text: bool = False) -> list[Path]:
    """Return the files of a split, told by the last name of a split in their path below the folder.

    A file by itself, or files without such a name, are the whole evaluation set: any split that is asked for.

    Args:
        root: A file or folder.
        split: Name of the split; ``validation`` is also found as ``val``, ``valid`` or ``dev``.
        subset: Parts of paths, in the order of preference: if the path of a file has the first one, only such files
            are taken, and so on.
        text: Take plain text as well as records.

    Raises:
        DataError: If the split has no file; names the splits that there are.
    """
    paths = [path for path in _files(root) if path.name not in _METADATA]
    found = {path: _split_of(path, root) for path in paths}
    if root.is_dir() and any(found.values()):
        exact = [path for path in paths if found[path] == split]
        paths = exact or [path for path in paths if found[path] in _NAMES.get(split, (split,))]
        if not paths:
            there = ", ".join(sorted({name for name in found.values() if name}))
            raise DataError(f"{root} has no split {split!r}; its files are of {there}. Name one of these: split=...")
    for part in subset:
        within = [path for path in paths if part.lower() in path.relative_to(root).as_posix().lower()]
        if within:
            paths = within
            break
    taken = (*RECORDS, "text") if text else RECORDS
    chosen = [path for path in paths if format_of(path).name in taken]
    if not chosen:
        raise DataError(f"{root} has no file of records (JSON lines, JSON, CSV, Parquet, Arrow) of split {split!r}.")
    return _once(chosen)


def _once(paths: Sequence[Path]) -> list[Path]:
    """Return one path of each file that is there in several formats, as ``test.jsonl`` beside ``test.csv``: JSON first.

    JSON keeps lists, and an archive of the authors often has both.
    """
    order = (*RECORDS, "text")
    chosen: dict[str, tuple[int, Path]] = {}
    for path in paths:
        found = order.index(format_of(path).name), path
        name = _FORMATS.sub("", str(path))
        chosen[name] = min(chosen.get(name, found), found, key=lambda known: known[0])
    return [path for path in paths if (order.index(format_of(path).name), path) in chosen.values()]


def has_splits(root: Path) -> bool:
    """Return whether the files of a folder are told apart by names of splits.

    Args:
        root: A file or folder.
    """
    return root.is_dir() and any(_split_of(path, root) for path in _files(root))


def _files(root: Path) -> list[Path]:
    if (root / "dataset_dict.json").exists():
        return [path for folder in sorted(root.iterdir()) if folder.is_dir() for path in find_files(folder)]
    return find_files(root)


def _split_of(path: Path, root: Path) -> str:
    words = re.split(r"[^a-z]+", path.relative_to(root).as_posix().lower())
    return next((word for word in reversed(words) if word in _SPLIT_NAMES), "")

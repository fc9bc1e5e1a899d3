"""The files below the paths that a user names: folders, links, patterns and saved Hugging Face datasets."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_lm.errors import DataError
from lightning_lm.storage import DIGESTS, check_digests, is_remembered, remember, verifies
from lightning_lm.storage.json_text import parse_json

__all__ = ["MANIFEST", "find_files", "looks_like_path", "roots_of"]

MANIFEST = "manifest.json"
"""Name of the file of a curated corpus that lists its data files."""

_ENDINGS = (".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".xz", ".bz2")


def roots_of(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the files and folders that paths name.

    Args:
        paths: One path or several; one that does not exist may be a pattern such as ``data/*.jsonl``.

    Raises:
        DataError: If one of them does not exist, or matches nothing.
    """
    roots: list[Path] = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        name = os.fspath(path)
        found = [name] if os.path.exists(name) else sorted(glob.glob(os.path.expanduser(name), recursive=True))
        if not found:
            raise DataError(f"There is no file or folder {name!r} (looked from {Path.cwd()}).{_hub_advice(name)}")
        roots += map(Path, found)
    if not roots:
        raise DataError("The list of files is empty; name at least one file or folder.")
    return roots


def find_files(root: Path, pattern: str = "**/*") -> list[Path]:
    """Return the files of a folder in the order of their names, without hidden ones; a file is itself.

    Folders that are symbolic links are followed, each folder once. Of a dataset that `datasets` saved, and of a curated
    corpus, its data files alone are taken.

    Args:
        root: A file or folder.
        pattern: Glob of the files that are taken, relative to the folder.

    Raises:
        DataError: If there is none, the folder is a saved dataset of several splits, or a curated corpus lacks a file.
    """
    if not root.is_dir():
        return [root]
    wanted = [part for part in pattern.split("/") if part not in ("", ".")]
    found = (path for path in _below(root, set()) if _matches(path.relative_to(root).parts, wanted))
    paths = sorted(_without_metadata(path for path in found if path.is_file() or path.is_symlink()))
    if not paths:
        raise DataError(f"The folder {str(root)!r} has no file that matches {pattern!r}.")
    return paths


def _hub_advice(name: str) -> str:
    """Return how a dataset of the Hugging Face Hub is fetched, for a name that may be one."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or looks_like_path(name):
        return ""
    folder = name.rsplit("/", 1)[1]
    command = f"hf download --repo-type dataset {name} --local-dir {folder}"
    return f" A dataset of the Hugging Face Hub is fetched first: {command}, then --data.train {folder}"


def looks_like_path(text: str) -> bool:
    """Tell whether a text is more likely the name of a file: it exists, or ends as data files do."""
    if not text or len(text) > 4096 or "\n" in text or "\0" in text:
        return False
    return text.lower().endswith(_ENDINGS) or os.path.exists(text)


def _below(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Yield the files below a folder; links come last, so that a file inside keeps its own name."""
    links: list[Path] = []
    for place, folders, names in os.walk(folder):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += [Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (Path(place, name) for name in names if not name.startswith("."))
    for link in links:
        if os.path.realpath(link) not in seen:
            yield from _below(link, seen)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Tell whether the parts of a path match those of a glob, in which ``**`` is any number of folders."""
    if not pattern or not parts:
        return not parts and (not pattern or list(pattern) == ["**"])
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _without_metadata(paths: Iterable[Path]) -> Iterator[Path]:
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    for folder, files in folders.items():
        _refuse_splits(folder / "dataset_dict.json")
        data = _data_files(folder / "state.json", "_data_files") or _curated_files(folder)
        wanted = data.__contains__ if data else lambda name: name != "dataset_dict.json"
        yield from (path for path in files if wanted(path.name))


def _refuse_splits(path: Path) -> None:
    splits = _json(path).get("splits", [])
    if len(splits) > 1:
        raise DataError(
            f"{path.parent} is a saved dataset with the splits {', '.join(splits)}, which do not belong together; name "
            f"the folder of one, such as {path.parent / splits[0]}."
        )


def _data_files(path: Path, key: str) -> set[str]:
    """Return the names of the data files of a saved dataset; none if the folder is no such dataset."""
    listed = _json(path).get(key)
    files = listed if isinstance(listed, list) else []
    return {file["filename"] for file in files if isinstance(file, dict) and "filename" in file}


def _curated_files(folder: Path) -> set[str]:
    """Return the names of the data files of a curated corpus, all of which must be there."""
    check_digests(folder, [MANIFEST])
    data = _data_files(folder / MANIFEST, "curated_files")
    missing = [name for name in data if not (folder / name).exists()]
    if missing:
        raise DataError(
            f"{folder / min(missing)} is missing: {MANIFEST} beside it lists it. Curate the corpus again, which writes "
            "missing files, or copy the folder again."
        )
    names = [MANIFEST, *sorted(data)]
    if data and verifies() and (folder / DIGESTS).is_file() and not is_remembered(folder, names):
        check_digests(folder, names)
        remember(folder, names)
    return data


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

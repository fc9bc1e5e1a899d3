"""Folders of files that belong together, such as a model's: an export over an older one is never half old, half new.

The files are first written into a hidden folder. A new folder then gets its name in one step. In a folder that exists,
which may be mounted by a server, files take the places of older ones one by one, and what a kill in between leaves is
the old content, the new content, or a folder that no reader opens:

* Shards get names of their own where the usual ones are taken, so that only the index, which is replaced in one step,
  decides which are read.
* If anything beside the weights changes, the files by which readers know a folder are removed first and put last.

Processes that write into one folder at the same time put their files there one after another: the last one wins.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_lm.storage.digests import DIGESTS, write_digests
from lightning_lm.storage.lock import in_turn
from lightning_lm.storage.replacing import naming, sync_folder
from lightning_lm.storage.temporaries import discard, remove_leftovers, temporary_for

__all__ = ["INDEX", "SINGLE", "TOKENIZER_FILES", "filling"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("lightning_lm_tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "tokenizer.json")
"""Files by which readers know a folder with a tokenizer; the first one alone is refused, for want of the others."""


@contextlib.contextmanager
def filling(folder: Path, *, known_by: Sequence[str]) -> Iterator[Path]:
    """Give an empty folder to write files into; they take their places, with digests, when the block ends.

    Args:
        folder: Created if needed. Other files in it stay, except weights of an earlier save.
        known_by: Names of the files by which readers know such a folder, the decisive one last; those that are not
            written are removed if anything beside the weights changes.

    Raises:
        OSError: If it cannot be written; has the path as ``filename``.
    """
    folder = folder.absolute()
    with naming(folder):
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
        place = folder / "files" if folder.is_dir() else folder
        remove_leftovers(folder)
        remove_leftovers(folder / "files")
        fresh = temporary_for(place)
        discard(fresh)
        fresh.mkdir()
        try:
            yield fresh
            _sync(fresh)
            if place == folder:
                write_digests(fresh, _names(fresh))
                with contextlib.suppress(OSError):  # somebody else has made it meanwhile
                    os.rename(fresh, folder)
            if fresh.is_dir():
                folder.mkdir(exist_ok=True)
                with in_turn(folder):
                    _put(fresh, folder, known_by)
            sync_folder(folder.parent)
        finally:
            discard(fresh)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != DIGESTS}


def _sync(folder: Path) -> None:
    for name in _names(folder):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _put(fresh: Path, folder: Path, known_by: Sequence[str]) -> None:
    """Put new files in the places of older ones; see the top of this file for the order."""
    _rename_shards(fresh, folder)
    names = _names(fresh)
    beside = names - {SINGLE, INDEX, *_shards(fresh)}
    (folder / DIGESTS).unlink(missing_ok=True)
    others = any((folder / name).exists() for name in known_by if name not in names)
    if others or not all(_is_same(fresh / name, folder / name) for name in beside):
        for name in reversed(known_by):
            (folder / name).unlink(missing_ok=True)
    last = [name for name in known_by if name in beside]
    switch = [name for name in (INDEX, SINGLE) if name in names]
    for name in [*sorted(names.difference(last, switch)), *switch]:
        os.replace(fresh / name, folder / name)
    if switch == [INDEX]:
        (folder / SINGLE).unlink(missing_ok=True)  # would be read in place of the index
    for name in last:
        os.replace(fresh / name, folder / name)
    for stale in {*_shards(folder), INDEX, SINGLE}.difference(names) if switch else ():
        (folder / stale).unlink(missing_ok=True)
    sync_folder(folder)
    write_digests(folder, names)


def _shards(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("model-*.safetensors")}


def _rename_shards(fresh: Path, folder: Path) -> None:
    """Give new shards names that no file of the folder has."""
    shards = _shards(fresh)
    if not any((folder / name).exists() for name in shards):
        return
    tag = secrets.token_hex(4)
    renamed = {name: name.replace("model-", f"model-{tag}-", 1) for name in shards}
    index = json.loads((fresh / INDEX).read_text(encoding="utf-8"))
    index["weight_map"] = {tensor: renamed[name] for tensor, name in index["weight_map"].items()}
    (fresh / INDEX).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for old, new in renamed.items():
        os.rename(fresh / old, fresh / new)


def _is_same(first: Path, second: Path) -> bool:
    return second.is_file() and first.read_bytes() == second.read_bytes()

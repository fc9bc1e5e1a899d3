"""Folders of runs: the newest finished run by name, and the record that says how a run ended.

A run of the command line writes ``run.json`` into its folder, ``<save_dir>/<name>/version_N``: "running" when training
starts, then "finished", "stopped" (by a signal) or "failed". A run that is killed stays "running", and is not taken.
"""

import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from lightning_lm.errors import CheckpointError
from lightning_lm.storage.json_text import parse_json
from lightning_lm.storage.replacing import replacing

__all__ = ["DEMOS", "claim_version", "is_first_process", "record_run", "resolve_checkpoint", "run_record", "where_from"]

DEMOS = frozenset({"smollm2"})
"""Published models that ``lightning-lm demo`` fetches."""
_RECORD = "run.json"
_told: set[tuple[Path, Path]] = set()


def is_first_process() -> bool:
    """Return whether no launcher says that this process is another rank than the first."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def claim_version(folder: Path) -> int:
    """Make the folder of a new run, and return its number; no other run gets the same.

    Args:
        folder: The folder of all runs of that name.
    """
    numbers = [
        int(found[1]) for path in folder.glob("version_*") if (found := re.fullmatch(r"version_(\d+)", path.name))
    ]
    number = max(numbers, default=-1) + 1
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            (folder / f"version_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return number


def record_run(folder: Path, status: str, **facts: Any) -> None:
    """Write the record of a run, in one step.

    Args:
        folder: The folder of the run.
        status: "running", "finished", "stopped" or "failed".
        **facts: Numbers and text, such as ``step`` and ``checkpoint`` (relative to the folder).
    """
    with replacing(folder / _RECORD) as file:
        file.write(json.dumps({"status": status, "time": time.time(), **facts}, indent=1).encode())


def resolve_checkpoint(path: Path | str) -> Path:
    """Return a checkpoint: a file or a model's folder as it is, of a folder of runs that of the newest finished one.

    Args:
        path: A checkpoint, the folder of a run, or the folder of all runs of a name, such as ``runs/sft_reverse``.

    Raises:
        CheckpointError: If there is nothing, or no run has finished.
    """
    path = Path(path)
    runs = _runs(path)
    if runs is None:
        if not path.exists():
            remedy = where_from(path)
            raise CheckpointError(f"There is no checkpoint at {path} (looked from {Path.cwd()}). {remedy}")
        return path
    finished = [found for run in runs if (found := _finished(run)) is not None]
    if not finished:
        raise CheckpointError(f"No run in {path} has finished{_left(runs)}. {_recipe(path)}".rstrip())
    ended_s, checkpoint = max(finished)
    if (path, checkpoint) not in _told and is_first_process():
        _told.add((path, checkpoint))
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(ended_s))
        sys.stderr.write(f"{path}: {checkpoint}, of the run that finished last ({when}).\n")
    return checkpoint


def _runs(path: Path) -> list[Path] | None:
    """Return the runs that a folder is or has; ``None`` if it is no such folder."""
    if not path.is_dir():
        return None
    if _is_run(path):
        return [path]
    versions = [child for child in path.iterdir() if child.is_dir() and (_is_run(child) or _is_version(child))]
    return versions or None


def _is_run(path: Path) -> bool:
    return (path / _RECORD).is_file() or (path / "checkpoints").is_dir()


def _is_version(path: Path) -> bool:
    return path.name.startswith("version_")


def run_record(run: Path) -> dict[str, Any] | None:
    """Return the record of a run; ``None`` if it has none: earlier releases and scripts wrote none.

    Args:
        run: The folder of the run.
    """
    try:
        found = parse_json((run / _RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _finished(run: Path) -> tuple[float, Path] | None:
    """Return when a run finished, in seconds, and its last checkpoint; ``None`` if it did not or left none."""
    record = run_record(run)
    if record is not None and record.get("status") != "finished":
        return None
    named = None if record is None else record.get("checkpoint")
    found = [run / named] if named else _last_checkpoints(run)
    found = [checkpoint for checkpoint in found if checkpoint.exists()]
    if not found:
        return None
    newest = max(found, key=lambda checkpoint: checkpoint.stat().st_mtime_ns)
    return float((record or {}).get("time", newest.stat().st_mtime)), newest


def _last_checkpoints(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob("last*.ckpt"))


def _left(runs: list[Path]) -> str:
    """Return the checkpoints of runs that did not finish, to be named if they are meant."""
    found = [checkpoint for run in runs for checkpoint in _last_checkpoints(run)]
    if not found:
        return ""
    newest = max(found, key=lambda checkpoint: checkpoint.stat().st_mtime_ns)
    return f"; to use an unfinished one, name its file: {newest}"


def where_from(path: Path | str) -> str:
    """Return what to type for a checkpoint that is not there: a recipe, a demo, or a download from the Hub.

    Args:
        path: Path at which it was looked for.
    """
    path = Path(path)
    if recipe := _recipe(path):
        return recipe
    if path.name in DEMOS:
        return f"That is a published model; fetch it first: lightning-lm demo {path.name} --output {path}"
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path)) and path.parts[0] != "runs":
        command = f"hf download {path} --local-dir {path.name}"
        return f"A model of the Hugging Face Hub is fetched first: {command}, then name {path.name}."
    return "Train that one first, or check the path."


def _recipe(path: Path) -> str:
    """Return the command of the recipe that writes runs of this name, if there is one."""
    spec = importlib.util.find_spec("lightning_lm.recipes")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for recipe in sorted(Path(folder).glob("*/*.yaml")):
            name = re.search(r"^  logger: \{init_args: \{name: (\w+)\}\}", recipe.read_text(encoding="utf-8"), re.M)
            if name is not None and name[1] in path.parts:
                short = f"{recipe.parent.name}/{recipe.stem}"
                return f"Run {short} first: lightning-lm fit --config {short}"
    return ""

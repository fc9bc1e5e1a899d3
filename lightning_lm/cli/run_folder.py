"""The folder of a run: its whole configuration, and the newest checkpoint for ``--ckpt_path last``, also after a kill.

Every run from the beginning gets a folder of its own, ``<save_dir>/<name>/version_N`` (Lightning's loggers number
them), so that no run overwrites another's checkpoints. A run that goes on does so in the folder it stopped in.
"""

import itertools
import os
import socket
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from lightning_lm.errors import CheckpointError
from lightning_lm.storage import record_run, replacing
from lightning_lm.strategies.checkpoints.atomic import check_checkpoint

__all__ = ["SaveConfig", "newest_checkpoint", "run_folder", "sound_checkpoint"]

_PATTERN = "last*.ckpt"


def run_folder(trainer: Mapping[str, Any]) -> Path:
    """Return the folder in which the numbered runs of a recipe lie.

    Args:
        trainer: The Trainer's configuration, as parsed.
    """
    default_root = Path(trainer.get("default_root_dir") or ".")
    arguments = _arguments(trainer.get("logger"))
    return Path(arguments.get("save_dir") or default_root) / (arguments.get("name") or "lightning_logs")


def newest_checkpoint(trainer: Mapping[str, Any]) -> Path | None:
    """Return the last checkpoint that was finished, over all runs, or ``None``.

    Args:
        trainer: The Trainer's configuration, as parsed.
    """
    found = {path: path.stat().st_mtime_ns for folder in _folders(trainer) for path in folder.glob(_PATTERN)}
    return max(found, key=lambda path: found[path]) if found else None


def sound_checkpoint(newest: Path) -> tuple[Path, list[str]]:
    """Return a checkpoint, or the newest one beside it that is sound if it is damaged, and reports of the damaged ones.

    Args:
        newest: The checkpoint to resume from.

    Raises:
        CheckpointError: If no checkpoint in its folder is sound.
    """
    others = {path: path.stat().st_mtime_ns for path in newest.parent.glob("*.ckpt") if path != newest}
    reports: list[str] = []
    for path in [newest, *sorted(others, key=lambda path: others[path], reverse=True)]:
        try:
            check_checkpoint(path)
        except CheckpointError as error:
            reports.append(str(error))
        else:
            return path, reports
    raise CheckpointError(
        f"{reports[0]} No other checkpoint in {newest.parent} is sound; name one of another run with --ckpt_path PATH, "
        "or train from the beginning without --ckpt_path."
    )


def _folders(trainer: Mapping[str, Any]) -> Iterator[Path]:
    yield from run_folder(trainer).glob("version_*/checkpoints")
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        folder = _arguments(callback).get("dirpath")
        if folder:
            yield Path(folder)


def _arguments(spec: Any) -> Mapping[str, Any]:
    first = spec[0] if isinstance(spec, list) and spec else spec
    arguments = first.get("init_args") if hasattr(first, "get") else None
    return arguments or {}


_HEADER = "# lightning.pytorch=="


class SaveConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the folder of the run, in one step.

    A run that goes on with other settings keeps the earlier ones as ``config.1.yaml``, ``config.2.yaml``, ...;
    Lightning's own callback refuses to start there. A file that no run wrote stays as it is, and a run without a
    logger, which has no folder of its own, writes nothing.

    Args:
        parser: Parser of the verb.
        config: Configuration, as parsed.
        text: The whole configuration as YAML.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *, text: str) -> None:
        super().__init__(parser, config)
        self._text = text

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file on the first rank when training starts, and note that it has started."""
        folder = trainer.log_dir  # asks the first rank, so every rank has to
        if stage != "fit" or folder is None or trainer.logger is None or not trainer.is_global_zero:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        record_run(Path(folder), "running", process=os.getpid(), host=socket.gethostname())
        header = "" if self._text.startswith("#") else f"{_HEADER}{version('lightning')}\n"
        _write(Path(folder) / self.config_filename, header + self._text)


def _write(path: Path, text: str) -> None:
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return
        free = next(other for other in _numbered(path) if not other.exists())
        if not _is_ours(path):
            path = free
        else:
            path.rename(free)
    with replacing(path) as file:
        file.write(text.encode())


def _numbered(path: Path) -> Iterator[Path]:
    return (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))


def _is_ours(path: Path) -> bool:
    """Tell whether a run wrote this file, which its first line says."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(_HEADER)

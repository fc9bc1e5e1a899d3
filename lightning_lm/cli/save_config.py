"""Writes the whole configuration of a run beside its logs."""

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lightning_lm.storage import record_run

__all__ = ["SaveConfig"]

_HEADER = "# lightning.pytorch=="


class SaveConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the folder of the run, in one step.

    A run that goes on with other settings keeps the earlier ones as ``config.1.yaml``, ``config.2.yaml``, ...;
    Lightning's own callback refuses to start there. A file that no run wrote stays as it is, and a run without a
    logger, which has no folder of its own, writes nothing.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file on the first rank when training starts, and note that it has started."""
        folder = trainer.log_dir  # asks the first rank, so every rank has to
        if stage != "fit" or folder is None or trainer.logger is None or not trainer.is_global_zero:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        record_run(Path(folder), "running", process=os.getpid(), host=socket.gethostname())
        text = self.parser.dump(self.config, skip_unset=False)
        _write(
            Path(folder) / self.config_filename, text if text.startswith("#") else f"{_HEADER} {__version__}\n{text}"
        )


def _write(path: Path, text: str) -> None:
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return
        free = next(other for other in _numbered(path) if not other.exists())
        if not _is_ours(path):
            path = free
        else:
            path.rename(free)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _numbered(path: Path) -> Iterator[Path]:
    return (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))


def _is_ours(path: Path) -> bool:
    """Tell whether a run wrote this file, which its first line says."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(_HEADER)

"""Checkpoint files that are whole or not there, and that run no code when they are loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_lm.errors import CheckpointError
from lightning_lm.modules.checkpoint import reading
from lightning_lm.modules.checkpoint_files import replacing_checkpoint
from lightning_lm.strategies.checkpoints.sharded import is_sharded, put, read_sharded, remove

__all__ = ["AtomicCheckpointIO", "check_checkpoint", "consolidate"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its target and renames it when it is complete and on the disk.

    A kill or a full disk at any moment leaves the previous file as it was. Lightning's own way writes into the system's
    temporary folder first, which may be small, and moves file by file across disks. Loading accepts only tensors and
    plain data, whatever ``Trainer.fit(weights_only=...)`` says. Addresses such as ``s3://`` are left to Lightning.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.strategies import AtomicCheckpointIO
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, enable_checkpointing=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Tensors and plain data.
            path: Path of the checkpoint; folders are made.
            storage_options: Not used here.

        Raises:
            CheckpointError: If it cannot be written, for instance because the disk is full.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing_checkpoint(Path(path), put) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint, with ``weights_only=True`` always.

        Args:
            path: File or address; or a folder that a sharded run wrote, of which all is read.
            map_location: Device of the tensors; by default they stay on the CPU.
            weights_only: Not used: nothing else is ever loaded.

        Raises:
            CheckpointError: If it is truncated, is no checkpoint, or holds more than tensors and plain data.
            FileNotFoundError: If there is no such file.
        """
        if is_sharded(path):
            return read_sharded(path)
        with reading(path):
            checkpoint: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file or a folder; a kill leaves all of it or nothing that looks like one.

        Args:
            path: File, folder or address.
        """
        if "://" in str(path):
            super().remove_checkpoint(path)
        else:
            remove(Path(path))


def check_checkpoint(path: Path | str) -> None:
    """Look whether a checkpoint is whole and undamaged, without reading its tensors into memory.

    Args:
        path: File or folder.

    Raises:
        CheckpointError: If it is truncated, damaged or no checkpoint.
        FileNotFoundError: If there is no such file.
    """
    if is_sharded(path):
        read_sharded(path, whole=False)
        return
    with reading(path):
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def consolidate(folder: Path | str, output: Path | str) -> None:
    """Write a plain checkpoint, which any Trainer can resume from and every verb reads.

    Args:
        folder: Folder that a sharded run saved.
        output: The file.

    Raises:
        CheckpointError: If the folder is no such checkpoint, or the file cannot be written.
    """
    if not is_sharded(folder):
        raise CheckpointError(
            f"{folder} is no checkpoint of a sharded run: it has no meta.pt. Give the folder that the run saved."
        )
    AtomicCheckpointIO().save_checkpoint(read_sharded(folder), output)

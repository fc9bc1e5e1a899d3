"""A folder that the ranks of a sharded run wrote, as a plain checkpoint. Needs no process group."""

from pathlib import Path

from lightning_lm.errors import CheckpointError
from lightning_lm.strategies.checkpoints.atomic import AtomicCheckpointIO
from lightning_lm.strategies.checkpoints.sharded import is_sharded, read_sharded

__all__ = ["consolidate"]


def consolidate(folder: Path | str, output: Path | str) -> None:
    """Write a plain checkpoint, which any Trainer can go on from and every verb reads.

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

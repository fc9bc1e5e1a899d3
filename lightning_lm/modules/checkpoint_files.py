"""Files of checkpoints that are written beside their target, straight to the disk, and renamed when they are whole.

Lightning's own way builds the file in memory, which takes as much again as weights and optimizer, and then writes it.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_lm.errors import CheckpointError
from lightning_lm.storage import SHARDED_DIGESTS, replacing, system_error

__all__ = ["reads_only_stock", "refusal", "replacing_checkpoint", "save_to_files"]


class _FileCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints as files that are whole or not there; all else is Lightning's.

    Modules of this package put it in the place of Lightning's own. ``lightning_lm.strategies.AtomicCheckpointIO``, a
    plugin of the Trainer, also reads without running code and knows folders of sharded runs.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Its content.
            path: Path of the checkpoint; folders are made.
            storage_options: Left to Lightning, as addresses such as ``s3://`` are.

        Raises:
            CheckpointError: If it cannot be written, for instance because the disk is full.
        """
        if storage_options is not None or "://" in str(path) or Path(path).is_dir():
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing_checkpoint(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint as Lightning does.

        Args:
            path: Path of the checkpoint, or its address.
            args: As Lightning has them.
            kwargs: As Lightning has them.

        Raises:
            CheckpointError: If it is the folder of a sharded run.
        """
        if Path(path).is_dir():
            raise CheckpointError(
                f"{path} is a folder, as sharded runs save it, and this Trainer reads files. Make one of it with "
                f"lightning-lm consolidate {path}, or let it read folders: Trainer(plugins=[AtomicCheckpointIO()]), "
                "from lightning_lm.strategies."
            )
        content: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return content


def save_to_files(trainer: Trainer) -> None:
    """Let a Trainer that has Lightning's default write its checkpoints without a copy in memory, and refuse folders.

    Args:
        trainer: The Trainer of the run.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = _FileCheckpointIO()
    if reads_only_stock(trainer.strategy):
        _refuse_folders(trainer.strategy)


def reads_only_stock(strategy: Strategy) -> bool:
    """Return whether a strategy reads folders by itself, without its plugin, and only those of Lightning's kind.

    Args:
        strategy: Strategy of the run.
    """
    stock = (
        FSDPStrategy.load_checkpoint,
        ModelParallelStrategy.load_checkpoint,
    )
    return type(strategy).load_checkpoint in stock  # ours derive from one, and have their own


def refusal(path: str | Path, strategy: Strategy) -> CheckpointError:
    """Return the error for a folder of this package that a strategy of Lightning cannot read.

    Args:
        path: The folder.
        strategy: Strategy of the run.
    """
    return CheckpointError(
        f"{path} is a folder that a strategy of this package saved, and {type(strategy).__name__} of Lightning reads "
        f"only its own. Make a file of it with lightning-lm consolidate {path}, and give that; or resume with another "
        "strategy: --trainer.strategy ShardedModelStrategy, zero1 or zero2 (in Python Trainer(strategy=...))."
    )


def _refuse_folders(strategy: Strategy) -> None:
    load = type(strategy).load_checkpoint

    def checked(path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if (Path(path) / SHARDED_DIGESTS).is_file():
            raise refusal(path, strategy)
        return load(strategy, path, *args, **kwargs)

    setattr(strategy, "load_checkpoint", checked)  # noqa: B010  of this instance


@contextlib.contextmanager
def replacing_checkpoint(target: Path, put: Callable[[Path, Path], None] | None = None) -> Iterator[Any]:
    """Give a temporary file in the folder of the target, and put it in its place if all went well.

    Args:
        target: Path of the checkpoint; folders are made.
        put: Moves the temporary file to the target, see `storage.replacing`.

    Raises:
        CheckpointError: If it cannot be written.
    """
    try:
        with replacing(target, put=put) as file:
            yield file
    except (OSError, RuntimeError) as error:  # torch's writer wraps what the file system says
        cause = system_error(error)
        raise CheckpointError(
            f"{target} was not written: {str(error).partition(chr(10))[0] if cause is None else cause.strerror}. "
            f"{'The previous file of that name is untouched. ' if target.exists() else ''}"
            "Free some space on this disk or save elsewhere (ModelCheckpoint's dirpath)."
        ) from error

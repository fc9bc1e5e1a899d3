"""Output paths of a run and the commands that use them next."""

import os
import shlex
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

__all__ = ["Left", "commands", "left_by"]


class Left(NamedTuple):
    """Files that a run wrote; ``None`` for those it did not."""

    checkpoint: str | None
    logs: str | None
    config: str | None
    """The YAML that the command line interface saved beside the logs."""
    tensorboard: str | None
    """The folder of this and of sister runs."""


def left_by(trainer: Trainer) -> Left:
    """Look up what a run wrote, relative to the current folder where it lies below it."""
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    checkpoints = [c.last_model_path for c in saved] + [c.best_model_path for c in saved]
    checkpoint = next((path for path in checkpoints if path and Path(path).exists()), None)
    # `trainer.log_dir` would be a collective call, and only rank 0 asks.
    logs = getattr(trainer.logger, "log_dir", None) or getattr(trainer.logger, "save_dir", None)
    config = Path(logs or trainer.default_root_dir) / "config.yaml"
    boards = [logger.root_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return Left(
        _near(checkpoint),
        _near(logs),
        _near(str(config)) if config.is_file() else None,
        _near(boards[0]) if boards else None,
    )


def commands(trainer: Trainer, left: Left, prompt: str | None) -> list[str]:
    """Return the commands that generate from the checkpoint, once it is one file, train on, and show the curves.

    Args:
        trainer: The Trainer of the run.
        left: Files of the run.
        prompt: Text to generate from; ``None`` if the checkpoint does not generate.
    """
    lines = []
    if left.checkpoint is not None:
        path = shlex.quote(left.checkpoint)
        whole = path
        if Path(left.checkpoint).is_dir() and prompt is not None:  # what ranks have written part by part
            whole = shlex.quote(f"{left.checkpoint.removesuffix('.ckpt')}.whole.ckpt")
            lines.append(f"lightning-lm consolidate {path} --output {whole}")
        if prompt is not None:
            lines.append(f"lightning-lm generate --checkpoint {whole} --prompt {shlex.quote(prompt)}")
        if left.config is None:
            data = "datamodule=datamodule" if trainer.datamodule is not None else "train_dataloader"  # type: ignore[attr-defined]
            lines.append(f"Trainer({_further(trainer)}).fit(module, {data}, ckpt_path={left.checkpoint!r})")
        else:
            option = f"--trainer.{_further(trainer).replace('=', ' ')}"
            lines.append(f"lightning-lm fit --config {shlex.quote(left.config)} --ckpt_path {path} {option}")
    if left.tensorboard is not None:
        lines.append(f"tensorboard --logdir {shlex.quote(left.tensorboard)}")
    return lines


def _further(trainer: Trainer) -> str:
    if trainer.max_steps > 0:
        return f"max_steps={2 * trainer.max_steps}"
    return f"max_epochs={2 * (trainer.max_epochs or 1)}" if trainer.max_epochs != -1 else "max_time=00:01:00:00"


def _near(path: str | None) -> str | None:
    if not path:
        return None
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative

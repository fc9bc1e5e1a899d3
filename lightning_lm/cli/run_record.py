"""The folder of a run that the command line starts: one run at a time, and a record of how it ended."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lm.cli.run_folder import run_folder
from lightning_lm.errors import RunStopped
from lightning_lm.storage import claim_version, held, is_first_process, record_run

__all__ = ["own_folder", "recorded"]


@contextlib.contextmanager
def own_folder(trainer: Mapping[str, Any], verb: str) -> Iterator[None]:
    """Give a run a folder of its own while its Trainer is built; the configuration that is saved names no folder.

    Training gets the next ``version_N``. What is only measured is logged in a folder of that verb's name.

    Args:
        trainer: The Trainer's configuration, as parsed.
        verb: The name of a method of the Trainer.
    """
    logger: Any = trainer.get("logger")
    numbered = hasattr(logger, "get") and str(logger.get("class_path")).endswith(("TensorBoardLogger", "CSVLogger"))
    if not numbered or logger["init_args"].get("version") is not None or trainer.get("fast_dev_run"):
        yield
        return
    settings, folder = logger["init_args"], None
    if verb != "fit":
        settings["version"] = verb
    elif is_first_process():
        settings["version"] = claim_version(run_folder(trainer))
        folder = run_folder(trainer) / f"version_{settings['version']}"
    try:
        yield
    except BaseException:
        if folder is not None:
            with contextlib.suppress(OSError):  # a logger has written into it; the first error is the one to see
                folder.rmdir()
        raise
    finally:
        settings["version"] = None


@contextlib.contextmanager
def recorded(trainer: Trainer) -> Iterator[None]:
    """Hold the folder of a run while it lasts, and record how it ends.

    Args:
        trainer: The Trainer of the run.

    Raises:
        ConfigurationError: If another run is under way in that folder.
    """
    folder = getattr(trainer.logger, "log_dir", None)
    if folder is None or not is_first_process() or "://" in str(folder):
        yield
        return
    folder = Path(folder)
    with held(folder, "train from the beginning, in a folder of its own: leave out --ckpt_path"):
        status = "failed"
        try:
            yield
            status = "finished"
        except RunStopped:
            status = "stopped"
            raise
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # nothing was written
            if folder.is_dir():
                record_run(folder, status, step=trainer.global_step, checkpoint=_checkpoint(trainer, folder))


def _checkpoint(trainer: Trainer, folder: Path) -> str | None:
    """Return the last checkpoint of a run, relative to its folder."""
    saved = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    paths = [saver.last_model_path for saver in saved] + [saver.best_model_path for saver in saved]
    return next((os.path.relpath(path, folder) for path in paths if path and Path(path).exists()), None)

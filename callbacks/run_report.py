"""The end of a run: its results, the files it wrote, and what to type next."""

import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lightning_lm.callbacks.formatting import number
from lightning_lm.callbacks.hooks import LeanHooks
from lightning_lm.callbacks.prompts import sample_prompts
from lightning_lm.data import Plain
from lightning_lm.modules import LMModule, RewardModule
from lightning_lm.modules.as_trained import with_trained_template

__all__ = ["Left", "RunReport", "commands", "left_by"]

_TRAINING = ("train/loss", "train/reward")


class RunReport(LeanHooks, Callback):
    """Print the results of a run, its checkpoint and logs, and the commands that use them.

    The results are those of the final weights: if the last validation came before the last step, there is one more,
    provided that the module has validation data. Commands are shown that work with this module and this checkpoint.

    Args:
        prompt: Prompt of the ``generate`` command that is shown; by default one from the validation data.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import RunReport
        >>> trainer = Trainer(callbacks=[RunReport()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, prompt: str | None = None) -> None:
        self._prompt = prompt
        self._validated_step: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the validations of an earlier run."""
        self._validated_step = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for a validation after the last step; Lightning validates when it is told to stop."""
        last_batch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if last_batch or trainer.global_step == trainer.max_steps:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when the model was measured."""
        if not trainer.sanity_checking:
            self._validated_step = trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print, on rank 0."""
        if not trainer.is_global_zero:
            return
        console = rich.get_console()
        results = self._results(trainer)
        if results is not None:
            console.print(results)
        left = left_by(trainer)
        lines = [f"Checkpoint: {left.checkpoint or 'none was written'}", f"Logs: {left.logs or 'none were written'}"]
        chat = _writes_chats(trainer)
        further = commands(trainer, left, self._prompt_for(trainer, pl_module, chat), chat=chat)
        lines += ["What to type next:", *(f"  {command}" for command in further)] if further else []
        console.print(Text("\n".join(lines)), soft_wrap=True)  # unbroken lines, to be copied

    def _results(self, trainer: Trainer) -> RenderableType | None:
        metrics = trainer.callback_metrics
        names = [name for name in metrics if name.startswith(("val/", "val_"))]
        names += [name for name in _TRAINING if name in metrics]
        if not names:
            return None
        table = Table.grid(padding=(0, 2))
        for name in names:
            late = name in _TRAINING or self._validated_step in (None, trainer.global_step)
            table.add_row(
                f"  {name}", number(float(metrics[name])), "" if late else f"at step {self._validated_step:,}"
            )
        table.title, table.title_justify, table.title_style = f"Results at step {trainer.global_step:,}", "left", "bold"
        return table

    def _prompt_for(self, trainer: Trainer, pl_module: LightningModule, chat: bool) -> str | None:
        """Return one line for the ``generate`` command; ``None`` if the checkpoint does not generate."""
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        if not isinstance(pl_module, LMModule) or isinstance(pl_module, RewardModule) or not hasattr(tokenizer, "save"):
            return None
        if self._prompt is not None:
            return self._prompt
        text = "Hi" if chat else sample_prompts(trainer, tokenizer, count=1)[0].text
        return next((line for line in text.splitlines() if line.strip()), "")


def _writes_chats(trainer: Trainer) -> bool:
    """Return whether the checkpoint has the chat template of the training data, so that ``generate --chat`` works."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    tokenizer = getattr(datamodule, "tokenizer", None)
    if isinstance(getattr(datamodule, "template", Plain()), Plain):
        return False
    return getattr(with_trained_template(tokenizer, datamodule), "chat_template", None) is not None


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


def commands(trainer: Trainer, left: Left, prompt: str | None, *, chat: bool = False) -> list[str]:
    """Return the commands that generate from the checkpoint, once it is one file, train on, and show the curves.

    Args:
        trainer: The Trainer of the run.
        left: Files of the run.
        prompt: Text to generate from; ``None`` if the checkpoint does not generate.
        chat: The prompt is a user's turn of a conversation.
    """
    lines = []
    if left.checkpoint is not None:
        path = shlex.quote(left.checkpoint)
        whole = path
        if Path(left.checkpoint).is_dir() and prompt is not None:  # what ranks have written part by part
            whole = shlex.quote(f"{left.checkpoint.removesuffix('.ckpt')}.whole.ckpt")
            lines.append(f"lightning-lm consolidate {path} --output {whole}")
        if prompt is not None:
            lines.append(f"lightning-lm generate --checkpoint {whole} {'--chat ' * chat}--prompt {shlex.quote(prompt)}")
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

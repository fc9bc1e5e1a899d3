"""The newest state of a run in one file, also at its very end."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lm.callbacks.hooks import LeanHooks
from lightning_lm.modules.base import LMModule
from lightning_lm.modules.divergence import require_finite_weights
from lightning_lm.modules.ranks import require_all_ranks

__all__ = ["LastCheckpoint"]


class LastCheckpoint(LeanHooks, ModelCheckpoint):
    """Keep ``last.ckpt`` of every n-th step and of the last one.

    Lightning's callback with ``save_last=True`` saves every n steps but not at the end, unless n divides the number of
    steps. ``fit --ckpt_path last`` goes on from this file. Weights that are not finite end the run instead of taking
    its place.

    Args:
        every_n_train_steps: Optimizer steps between saves.
        dirpath: Folder of the file; that of the logger when left out.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import LastCheckpoint
        >>> trainer = Trainer(callbacks=[LastCheckpoint(every_n_train_steps=50)], logger=False)
    """

    def __init__(self, every_n_train_steps: int = 100, dirpath: Path | str | None = None) -> None:
        super().__init__(dirpath=dirpath, save_last=True, save_top_k=0, every_n_train_steps=every_n_train_steps)
        self._every_n_steps = every_n_train_steps

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, unless that was done when it ended."""
        super().on_train_end(trainer, pl_module)  # saves only where nothing was saved yet
        if not trainer.fast_dev_run and trainer.global_step % self._every_n_steps and self.last_model_path:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.last_model_path, weights_only=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that are not finite, whatever the module; ours have looked already.

        Raises:
            DivergenceError: If a weight that is trained is not finite.
        """
        if not isinstance(pl_module, LMModule):
            require_all_ranks(trainer)
            require_finite_weights(trainer, pl_module)

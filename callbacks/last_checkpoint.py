"""The newest state of a run in one file, also at its very end."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lm._lightning import save_last
from lightning_lm.callbacks.hooks import LeanHooks
from lightning_lm.distributed import require_all_ranks
from lightning_lm.modules.base import LMModule
from lightning_lm.modules.divergence import require_finite_weights
from lightning_lm.modules.signal_stop import SignalStop

__all__ = ["LastCheckpoint"]


class LastCheckpoint(LeanHooks, ModelCheckpoint):
    """Keep ``last.ckpt`` of every n-th step and of the last one.

    Lightning's callback with ``save_last=True`` saves every n steps but not at the end, unless n divides the number of
    steps. ``fit --ckpt_path last`` resumes from this file. SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 save it as well: the
    step ends, and then the process, with status 128 + the signal's number (see `SignalStop`). Weights that are not
    finite end the run instead of taking its place.

    Args:
        every_n_train_steps: Optimizer steps between saves.
        dirpath: Folder of the file; by default that of the logger.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import LastCheckpoint
        >>> trainer = Trainer(callbacks=[LastCheckpoint(every_n_train_steps=50)], logger=False)
    """

    def __init__(self, every_n_train_steps: int = 100, dirpath: Path | str | None = None) -> None:
        super().__init__(dirpath=dirpath, save_last=True, save_top_k=0, every_n_train_steps=every_n_train_steps)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, and see to it that signals save too."""
        super().setup(trainer, pl_module, stage)
        SignalStop.attach(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, unless that was done when it ended."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_last(trainer, self)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that are not finite, whatever the module; ours have looked already.

        Raises:
            DivergenceError: If a weight that is trained is not finite.
        """
        if not isinstance(pl_module, LMModule):
            require_all_ranks(trainer)
            require_finite_weights(trainer, pl_module)

"""Numbers straight to the loggers: what ``self.log`` costs at every step is here paid once a logging interval."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer

__all__ = ["LogInterval", "emit"]


class LogInterval:
    """Detector of optimizer steps that end a logging interval, also under gradient accumulation."""

    def __init__(self) -> None:
        self.step = 0

    def reset(self, trainer: Trainer) -> None:
        """Start at the trainer's present step."""
        self.step = trainer.global_step

    def stepped(self, trainer: Trainer) -> bool:
        """Return whether the optimizer has stepped since the last call."""
        before, self.step = self.step, trainer.global_step
        return self.step != before

    def ends(self, trainer: Trainer) -> bool:
        """Return whether the trainer's loggers record the current step."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and self.step % every == 0


def emit(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Hand numbers to every logger, and to ``trainer.callback_metrics`` for whoever watches them.

    Args:
        trainer: The running trainer; its ``global_step`` is the step that is recorded.
        metrics: Names and values. On ranks other than 0 the loggers write nothing.
    """
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)

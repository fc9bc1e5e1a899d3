"""A loss that jumps, or is no longer a number: noticed at the next log, counted, and if wished the end of a run."""

import math
import statistics
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lm.callbacks.hooks import LeanHooks, LogInterval, emit
from lightning_lm.callbacks.training_loss import TrainingLoss
from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Limit, check_numbers

__all__ = ["LossSpike"]

_DEVIATION_PER_MAD = 1.4826  # of a normal distribution


class LossSpike(LeanHooks, Callback):
    """Warn when a logged training loss is far above the recent ones.

    The comparison is with the median, in units of the median absolute deviation, so that one spike does not hide the
    next. ``train/loss_spikes`` counts them. It runs at logging intervals, on the mean loss since the last
    one, without device synchronisation or communication in between.

    Lightning's ``SpikeDetection`` runs at every step, with two collectives and a synchronisation each, always ends the
    run, and in 2.6 cannot be resumed. To skip single bad steps, give an `LMModule` a skip rule.

    Args:
        deviations: Distance of a spike from the median, in standard deviations.
        min_rise: Smallest distance of a spike from the median, nats.
        window: Number of recent logged losses to compare with.
        stop: End the run at a spike.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import LossSpike
        >>> trainer = Trainer(callbacks=[LossSpike(stop=True)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, deviations: float = 6.0, min_rise: float = 0.2, window: int = 30, stop: bool = False) -> None:
        if window < 2:
            raise ConfigurationError(f"window={window} has no spread; give at least 2.")
        limits = {"deviations": Limit.POSITIVE, "min_rise": Limit.NON_NEGATIVE}
        check_numbers(limits, {"deviations": deviations, "min_rise": min_rise})
        self.spikes = 0
        self._deviations = deviations
        self._min_rise = min_rise
        self._stop = stop
        self._losses: deque[float] = deque(maxlen=window)
        self._interval = LogInterval()
        self._loss = TrainingLoss()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the count where a checkpoint left it."""
        self._interval.reset(trainer)
        self._loss.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look if the loggers do."""
        self._loss.add(trainer, pl_module, outputs)
        if self._interval.stepped(trainer) and self._interval.ends(trainer):
            self._look(trainer, self._loss.read(trainer, pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return the count and the losses that the next one is compared with."""
        return {"spikes": self.spikes, "losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.spikes = state_dict["spikes"]
        self._losses.extend(state_dict["losses"])

    def _look(self, trainer: Trainer, loss: float | None) -> None:
        if loss is None:
            return
        usual = self._threshold()
        if not math.isfinite(loss) or (usual is not None and loss > usual):
            self.spikes += 1
            rank_zero_warn(f"Loss spike at step {trainer.global_step:,}: {loss:.4g}, where {self._usual()} is usual.")
            trainer.should_stop = trainer.should_stop or self._stop
        if math.isfinite(loss):
            self._losses.append(loss)
        emit(trainer, {"train/loss_spikes": float(self.spikes)})

    def _threshold(self) -> float | None:
        if len(self._losses) < max(2, (self._losses.maxlen or 2) // 3):
            return None
        median = statistics.median(self._losses)
        spread = _DEVIATION_PER_MAD * statistics.median(abs(loss - median) for loss in self._losses)
        return median + max(self._min_rise, self._deviations * spread)

    def _usual(self) -> str:
        return f"{statistics.median(self._losses):.4g}" if self._losses else "nothing yet"

"""Learning-rate schedules: pure functions of the position in a run and its length, and the scheduler that applies one.

Nothing of the length is kept in a checkpoint, so a run is extended or cooled down by resuming it with another YAML.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lm.parts import Limit, Part

__all__ = ["WSD", "Constant", "Cosine", "InverseSquareRoot", "Linear", "Schedule", "ScheduledLR"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(Part, abc.ABC, limits={"warmup": Limit.NON_NEGATIVE, "horizon_tokens": Limit.COUNT}):
    """Base of every schedule: linear warm-up, then a shape of its own.

    Positions, lengths and horizons are counted in optimizer steps, or in target tokens where `horizon_tokens` is set.
    """

    warmup: float = 0.0
    """Length of the linear warm-up; below one: a fraction of the horizon."""
    horizon_tokens: int | None = None
    """Length of the run in target tokens; default: the Trainer's number of optimizer steps."""

    def multiplier(self, step: int, horizon: int) -> float:
        """Return the factor on the peak learning rate of the update that follows `step` finished ones.

        Args:
            step: Position, from 0.
            horizon: Length of the run, in the same unit.
        """
        warmup = _length(self.warmup, horizon)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.after_warmup(step - warmup, max(1, horizon - warmup))

    @property
    def needs_horizon(self) -> bool:
        """True if the shape depends on the length of the run."""
        return True

    @abc.abstractmethod
    def after_warmup(self, step: int, horizon: int) -> float:
        """Return the multiplier at a position counted from the end of the warm-up, over the rest of the horizon."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The peak all along."""

    @property
    def needs_horizon(self) -> bool:
        """Only a warm-up given as a fraction depends on the length of the run."""
        return 0 < self.warmup < 1

    def after_warmup(self, step: int, horizon: int) -> float:  # noqa: ARG002
        """Return one."""
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSquareRoot(Constant, limits={"timescale": Limit.COUNT}):
    """Falls with the root of the position, without an end.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, equation 3.
    """

    timescale: int = 1000
    """Length over which the factor stays near one."""

    def after_warmup(self, step: int, horizon: int) -> float:  # noqa: ARG002
        """Return ``1 / sqrt(1 + step / timescale)``."""
        return 1.0 / math.sqrt(1.0 + step / self.timescale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule, limits={"final": Limit.NON_NEGATIVE}):
    """Half a cosine from the peak to `final`.

    Source:
        Loshchilov and Hutter 2016, arXiv:1608.03983, equation 5, without restarts.
    """

    final: float = 0.1
    """Factor at the end."""

    def after_warmup(self, step: int, horizon: int) -> float:
        """Return the cosine's value."""
        return _between(self.final, 0.5 * (1 + math.cos(math.pi * min(1.0, step / horizon))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule, limits={"final": Limit.NON_NEGATIVE}):
    """A straight line from the peak to `final`."""

    final: float = 0.0
    """Factor at the end."""

    def after_warmup(self, step: int, horizon: int) -> float:
        """Return the line's value."""
        return _between(self.final, 1 - min(1.0, step / horizon))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSD(Schedule, limits={"decay": Limit.NON_NEGATIVE, "final": Limit.NON_NEGATIVE}):
    """Warm up, stay at the peak, decay in a straight line at the end.

    Any checkpoint of the stable part can be continued, or cooled down by a shorter horizon.

    Source:
        Hu et al. 2024, arXiv:2404.06395, section 4; Haegele et al. 2024, arXiv:2405.18392.
    """

    decay: float = 0.2
    """Length of the decay; at most one: a fraction of the horizon."""
    final: float = 0.0
    """Factor at the end."""

    def multiplier(self, step: int, horizon: int) -> float:
        """Return the smaller of the warm-up's and the decay's factor."""
        decay = max(1, round(self.decay * horizon) if self.decay <= 1 else round(self.decay))
        left = min(1.0, max(0.0, (horizon - step) / decay))
        return min(super().multiplier(step, horizon), _between(self.final, left))

    def after_warmup(self, step: int, horizon: int) -> float:  # noqa: ARG002
        """Return one."""
        return 1.0


def _length(length: float, horizon: int) -> int:
    return round(length * horizon) if length < 1 else round(length)


def _between(final: float, share: float) -> float:
    return final + (1 - final) * share


class ScheduledLR(LRScheduler):
    """Gives every group its own peak learning rate times one schedule.

    When a run is resumed the position comes from the checkpoint; peak rates, weight decay, momentum and the schedule
    come from the run that resumes.

    Args:
        optimizer: Its groups hold their peak learning rates.
        schedule: Factor on these.
        horizon: Length of the run, in the unit of the schedule.
        position: Returns the position; default: the number of steps taken.
    """

    def __init__(
        self, optimizer: Optimizer, schedule: Schedule, *, horizon: int, position: Callable[[], int] | None = None
    ) -> None:
        self.schedule, self.horizon, self.position = schedule, horizon, position
        self._settings = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in optimizer.param_groups
        ]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Any]:
        """Return the learning rate of every group for the next step."""
        position = self.last_epoch if self.position is None else self.position()
        factor = self.schedule.multiplier(position, self.horizon)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the position only."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position from a checkpoint, and everything else from this run."""
        self.last_epoch = state_dict["last_epoch"]
        for group, settings, base, lr in zip(
            self.optimizer.param_groups, self._settings, self.base_lrs, self.get_lr(), strict=True
        ):
            group.update(settings, initial_lr=base, lr=lr)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

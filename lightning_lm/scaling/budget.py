"""A budget that cannot be overspent: what a run may take is set aside first, and what it took is charged after."""

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Part
from lightning_lm.scaling.record import RunRecord

if TYPE_CHECKING:
    from lightning_lm.scaling.sweep import Trial

__all__ = ["Budget", "ClockMeter", "FlopMeter", "Meter"]


@dataclass(frozen=True, kw_only=True)
class Meter(Part, abc.ABC):
    """Base of what is measured."""

    @property
    @abc.abstractmethod
    def unit(self) -> str:
        """The unit, as a person reads it."""

    @abc.abstractmethod
    def at_most(self, trial: "Trial") -> float:
        """Return what a run may take.

        Args:
            trial: Before it runs.
        """

    @abc.abstractmethod
    def used(self, record: RunRecord) -> float:
        """Return what a run took.

        Args:
            record: Record of the finished run.
        """


@dataclass(frozen=True, kw_only=True)
class FlopMeter(Meter):
    """Training FLOPs in one convention.

    Args:
        convention: A key of `lightning_lm.scaling.CONVENTIONS`.
        margin: Share by which a run may exceed its plan.
    """

    convention: str = "products"
    margin: float = 0.05

    @property
    def unit(self) -> str:
        """FLOPs."""
        return "FLOPs"

    def at_most(self, trial: "Trial") -> float:
        """Return the planned FLOPs and the margin."""
        return trial.flops * (1 + self.margin)

    def used(self, record: RunRecord) -> float:
        """Return the FLOPs of the tokens that were trained on."""
        return record.flops(self.convention)


@dataclass(frozen=True, kw_only=True)
class ClockMeter(Meter):
    """Seconds of training.

    Args:
        flops_per_s: FLOP/s of the slowest run on this device: small models on large devices are far from the peak.
    """

    flops_per_s: float

    @property
    def unit(self) -> str:
        """Seconds."""
        return "s"

    def at_most(self, trial: "Trial") -> float:
        """Return the planned FLOPs at the slowest rate."""
        return trial.flops / self.flops_per_s

    def used(self, record: RunRecord) -> float:
        """Return the seconds of training, or nothing where they are not known."""
        return record.wall_time_s or 0.0


class Budget:
    """Reserve, charge, refuse.

    Args:
        limit: In the meter's unit.
        meter: Measure of cost.
        spent_by: Runs that were made from this budget before, when a sweep is resumed.

    Attributes:
        limit: As given.
        meter: As given.
        spent: Charged so far.

    Example:
        >>> from lightning_lm.scaling import Trial
        >>> budget = Budget(1e12, FlopMeter())
        >>> budget.reserve(Trial(settings={"width": 64}, flops=9e11))
        >>> round(budget.left / 1e10, 1)
        5.5
    """

    def __init__(self, limit: float, meter: Meter, *, spent_by: Iterable[RunRecord] = ()) -> None:
        if not limit > 0:
            raise ConfigurationError(f"A budget of {limit} {meter.unit} allows no run; give a positive number.")
        self.limit, self.meter = limit, meter
        self.spent = sum(meter.used(record) for record in spent_by)
        self._reserved: dict[str, float] = {}
        self._seen: set[str] = set()

    @property
    def left(self) -> float:
        """Budget that is neither spent nor reserved."""
        return self.limit - self.spent - sum(self._reserved.values())

    def reserve(self, trial: "Trial") -> None:
        """Set aside what a run may take.

        Args:
            trial: The run.

        Raises:
            ConfigurationError: If it does not fit, or was reserved before.
        """
        if trial.id in self._seen:
            raise ConfigurationError(f"The run {trial} was asked for before; change a setting, or its seed.")
        amount, unit = self.meter.at_most(trial), self.meter.unit
        if amount > self.left:
            raise ConfigurationError(
                f"The run {trial} may take {amount:.3g} {unit} and {max(0.0, self.left):.3g} of {self.limit:.3g} "
                f"{unit} are left. Plan smaller runs, or raise the budget."
            )
        self._reserved[trial.id] = amount
        self._seen.add(trial.id)

    def charge(self, trial: "Trial", record: RunRecord) -> float:
        """Replace what was set aside by what was used, also where that is more, and return it.

        Args:
            trial: A run that was reserved.
            record: Record of the finished trial.
        """
        del self._reserved[trial.id]
        used = self.meter.used(record)
        self.spent += used
        return used

    def release(self, trial: "Trial") -> None:
        """Give back what was set aside for a run that came to nothing; it may be asked for again.

        Args:
            trial: A run that was reserved.
        """
        del self._reserved[trial.id]
        self._seen.discard(trial.id)

"""Many runs under one budget: hyper-parameters in, loss out, and an unfinished sweep resumes where it stopped.

The budget cannot be overspent: the FLOPs that a run may use are reserved before it and charged after it.
"""

import abc
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lightning_lm.errors import ConfigurationError, LightningLMError
from lightning_lm.parts import Limit, Part
from lightning_lm.scaling.ledger import RunLedger, RunRecord

__all__ = ["Budget", "ClockMeter", "FlopMeter", "Meter", "Outcome", "Sweep", "Trial"]


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
class FlopMeter(Meter, limits={"margin": Limit.NON_NEGATIVE}):
    """Training FLOPs in one convention.

    Args:
        convention: A key of `lightning_lm.scaling.CONVENTIONS`.
        margin: Fraction by which a run may exceed its plan.
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
class ClockMeter(Meter, limits={"flops_per_s": Limit.POSITIVE}):
    """Seconds of training.

    Args:
        flops_per_s: FLOP/s of the slowest run on this device: small models on large devices are far from the peak.
    """

    flops_per_s: float = field(kw_only=False)

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
    """Budget of a sweep, from which runs are reserved and charged.

    Args:
        limit: Budget in the meter's unit.
        meter: Measure of cost.
        spent_by: Runs already charged to this budget, when a sweep is resumed.

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
        """Reserve the FLOPs that a run may use.

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
        """Replace the reserved FLOPs by those that were used, also if these are more, and return them.

        Args:
            trial: A run that was reserved.
            record: Record of the finished trial.
        """
        del self._reserved[trial.id]
        used = self.meter.used(record)
        self.spent += used
        return used

    def release(self, trial: "Trial") -> None:
        """Give back the FLOPs reserved for a run that failed; the run may be asked for again.

        Args:
            trial: A run that was reserved.
        """
        del self._reserved[trial.id]
        self._seen.discard(trial.id)


Status = Literal["trained", "found", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run to make.

    Args:
        settings: Plain data that tells it from other trials; the record's ``hyper_parameters`` will be the same.
        flops: Planned FLOPs.
        name: Display name.
    """

    settings: Mapping[str, Any]
    flops: float
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.name or ", ".join(f"{key}={value}" for key, value in self.settings.items())

    @property
    def id(self) -> str:
        """A hash of the settings."""
        return _hash(self.settings)


class Outcome(NamedTuple):
    """Outcome of a trial."""

    trial: Trial
    status: Status
    record: RunRecord | None = None
    message: str = ""


class Sweep:
    """Train what is not in the ledger yet, as far as the budget goes.

    Args:
        trials: In the order in which they are to be made.
        train: Trains one and leaves its record, with the trial's settings as ``hyper_parameters``, in the ledger.
        ledger: Ledger; records of an earlier, interrupted call count as done.
        budget: Budget of the sweep.
        jobs: Runs at the same time; more than one only where ``train`` starts a process for each.

    Raises:
        ConfigurationError: If two trials have the same settings.

    Example:
        >>> from lightning_lm.scaling import FlopMeter
        >>> ledger = RunLedger("ledger.jsonl")
        >>> def train(trial):
        ...     width = trial.settings["width"]
        ...     flops = {"products": 6.0 * width}
        ...     made = {"parameters": {"total": width}, "flops_per_token": flops, "tokens": 10, "loss": 5 - width / 100}
        ...     ledger.add(RunRecord(**made, hyper_parameters=trial.settings))
        >>> trials = [Trial(settings={"width": width}, flops=60.0 * width) for width in (8, 16)]
        >>> sweep = Sweep(trials, train, ledger=ledger, budget=Budget(1e4, FlopMeter()))
        >>> [outcome.record.loss for outcome in sweep.run()]
        [4.92, 4.84]
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        train: Callable[[Trial], None],
        *,
        ledger: RunLedger,
        budget: Budget,
        jobs: int = 1,
    ) -> None:
        ids = [trial.id for trial in trials]
        if len(set(ids)) < len(ids):
            twice = next(trial for trial in trials if ids.count(trial.id) > 1)
            raise ConfigurationError(f"The sweep holds {twice} twice; give each run a setting of its own, or a seed.")
        self._trials, self._train, self._ledger, self._budget, self._jobs = trials, train, ledger, budget, jobs

    def run(self) -> Iterator[Outcome]:
        """Yield what became of each trial, as soon as it is known; failures and refusals stop no other run."""
        done = {_hash(record.hyper_parameters): record for record in self._ledger.read() if record.finished}
        waiting = [trial for trial in self._trials if trial.id not in done]
        yield from (Outcome(trial, "found", done[trial.id]) for trial in self._trials if trial.id in done)
        if self._jobs == 1:
            yield from (self._outcome(trial) for trial in waiting)
            return
        with ThreadPoolExecutor(self._jobs) as pool:
            yield from pool.map(self._outcome, waiting)

    def _outcome(self, trial: Trial) -> Outcome:
        try:
            self._budget.reserve(trial)
        except ConfigurationError as error:
            return Outcome(trial, "refused", message=str(error))
        try:
            self._train(trial)
        except (LightningLMError, OSError) as error:
            self._budget.release(trial)
            return Outcome(trial, "failed", message=str(error))
        except BaseException:
            self._budget.release(trial)
            raise
        found = [r for r in self._ledger.read() if r.finished and _hash(r.hyper_parameters) == trial.id]
        if not found:
            self._budget.release(trial)
            return Outcome(trial, "failed", message=f"it left no record in {self._ledger.path}")
        self._budget.charge(trial, found[-1])
        return Outcome(trial, "trained", found[-1])


def _hash(settings: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(settings, sort_keys=True, default=str))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

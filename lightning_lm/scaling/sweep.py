"""Many runs under one budget: hyper-parameters in, loss out, and a half-done sweep goes on where it stopped."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lightning_lm.errors import ConfigurationError, LightningLMError
from lightning_lm.scaling.budget import Budget
from lightning_lm.scaling.ledger import RunLedger
from lightning_lm.scaling.record import RunRecord

__all__ = ["Outcome", "Sweep", "Trial"]

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

"""Calls several rewards on a batch of samples, and keeps the run alive when one of them fails.

A reward is foreign code: it may raise anything, hang or return NaN. Each of these is reported with the sample, that one
reward counts as "not applicable" there, and training continues, unless the run was asked to stop. It runs in the
process of the run, which ``os._exit`` or a crash of native code ends; untrusted programs belong in `CodeTests`.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import numpy as np

from lightning_lm.errors import ConfigurationError, LightningLMError
from lightning_lm.parts import Limit, Part
from lightning_lm.rewards.calling import ReturnedValueError, call_reward, reward_name

__all__ = ["RewardError", "RewardFailure", "RewardTable", "Scoring", "check_weights", "reward_name", "score"]


class RewardError(LightningLMError, RuntimeError):
    """A reward failed on every completion of a rollout, or once, if the run was asked to stop at that."""


@dataclass(frozen=True)
class RewardFailure:
    """A sample for which a reward failed.

    Args:
        reward: The reward's name.
        sample: Index of the sample in the batch.
        reason: Description of the failure.
        completion: Beginning of the completion.
    """

    reward: str
    sample: int
    reason: str
    completion: str

    def __str__(self) -> str:
        return (
            f"Reward {self.reward!r} failed on sample {self.sample}: {self.reason}. Its completion: {self.completion!r}"
        )


@dataclass(frozen=True)
class RewardTable:
    """Rewards of every sample by every function.

    Args:
        names: One name per reward.
        values: float64 [samples, rewards], NaN where a reward does not apply.
        totals: float64 [samples], weighted sum of the rewards that apply; NaN if none does.
        failures: Samples for which a reward failed.
    """

    names: tuple[str, ...]
    values: np.ndarray
    totals: np.ndarray
    failures: tuple[RewardFailure, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Scoring(Part, limits={"timeout_s": Limit.POSITIVE}):
    """Settings of calling rewards.

    Args:
        timeout_s: Time limit of one reward for a whole batch, unless it limits each sample itself, as
            `MathAnswer` and `CodeTests` do. Seconds.
        stop_on_failure: Raise `RewardError` at the first failure instead of reporting it.
    """

    timeout_s: float = 60.0
    stop_on_failure: bool = False


def score(
    rewards: Sequence[Callable[..., Any]],
    weights: Sequence[float],
    *,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
    scoring: Scoring | None = None,
) -> RewardTable:
    """Call each reward on all samples and return the weighted sums.

    Args:
        rewards: Functions of lists or of single samples, sync or async.
        weights: One factor per reward.
        prompts: The prompt of each sample.
        completions: Completion of each sample.
        columns: Further columns of the samples, passed on by name.
        scoring: Time limit, and what to do when a reward fails.

    Raises:
        RewardError: If a reward fails and ``scoring.stop_on_failure`` is set.
        ConfigurationError: If there are not as many weights as rewards.
    """
    scoring = scoring or Scoring()
    check_weights(weights, rewards)
    samples = {"prompts": list(prompts), "completions": list(completions), **(columns or {})}
    values = np.full((len(completions), len(rewards)), np.nan)
    failures: list[RewardFailure] = []
    for place, reward in enumerate(rewards):
        values[:, place], failed = _score_with(reward, samples, scoring)
        failures += failed
    if failures and scoring.stop_on_failure:
        raise RewardError(str(failures[0]))
    silent = np.isnan(values)
    totals = np.where(silent, 0.0, values * np.asarray(weights, dtype=float)).sum(1)
    totals[silent.all(1)] = np.nan
    return RewardTable(tuple(map(reward_name, rewards)), values, totals, tuple(failures))


def _score_with(
    reward: Callable[..., Any], samples: Mapping[str, Sequence[Any]], scoring: Scoring
) -> tuple[np.ndarray, list[RewardFailure]]:
    """Return one reward's values, NaN where it has none, and its failures."""
    count = len(samples["completions"])
    limit_s = None if getattr(reward, "limits_itself", False) else scoring.timeout_s
    returned, reason = _call(reward, samples, limit_s)
    if reason is None:
        return _checked(reward, returned, samples)
    if count == 1 or reason.startswith(("no answer", "it returned")):
        # A reward that hangs is not called again: each further call could hang as long.
        return np.full(count, np.nan), [_failure(reward, samples, sample, reason) for sample in range(count)]
    values, failures = np.full(count, np.nan), []
    for sample in range(count):
        alone = {name: column[sample : sample + 1] for name, column in samples.items()}
        single, found = _score_with(reward, alone, scoring)
        values[sample] = single[0]
        failures += [_failure(reward, samples, sample, failure.reason) for failure in found]
    return values, failures


def _checked(
    reward: Callable[..., Any], returned: Sequence[Any], samples: Mapping[str, Sequence[Any]]
) -> tuple[np.ndarray, list[RewardFailure]]:
    values, failures = np.full(len(returned), np.nan), []
    for sample, value in enumerate(returned):
        if isinstance(value, float):
            values[sample] = value
        elif value is not None:
            reason = f"it returned {value}, and a finite number is needed"
            failures.append(_failure(reward, samples, sample, reason))
    return values, failures


def _number_or_text(value: Any) -> float | str | None:
    """Return a value as a number, or as text if it is none: NaN, a tensor of several numbers, 10 ** 400."""
    try:
        if value is None or (isinstance(value, SupportsFloat) and math.isfinite(value)):
            return None if value is None else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    return repr(value)[:80]


def _failure(
    reward: Callable[..., Any], samples: Mapping[str, Sequence[Any]], sample: int, reason: str
) -> RewardFailure:
    return RewardFailure(reward_name(reward), sample, reason, str(samples["completions"][sample])[:200])


def check_weights(weights: Sequence[float] | None, rewards: Sequence[Any]) -> None:
    """Refuse weights that are not one per reward.

    Args:
        weights: One factor per reward; equal by default.
        rewards: The rewards.

    Raises:
        ConfigurationError: If the numbers differ.
    """
    if weights is not None and len(weights) != len(rewards):
        names = ", ".join(map(reward_name, rewards))
        raise ConfigurationError(
            f"reward_weights={list(weights)} has {len(weights)} factors for {len(rewards)} rewards ({names}). "
            "Give one per reward, in their order."
        )


def _call(
    reward: Callable[..., Any], samples: Mapping[str, Sequence[Any]], timeout_s: float | None
) -> tuple[Any, str | None]:
    """Return the values, or the reason why there are none. A call that hangs is left behind in its thread."""
    box: list[tuple[Any, str | None]] = []
    thread = threading.Thread(target=_call_into, args=(box, reward, samples), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return box[0] if box else (None, f"no result within {timeout_s} s")


def _call_into(
    box: list[tuple[Any, str | None]], reward: Callable[..., Any], samples: Mapping[str, Sequence[Any]]
) -> None:
    try:
        box.append(([_number_or_text(value) for value in call_reward(reward, samples)], None))
    except ReturnedValueError as error:
        box.append((None, str(error)))
    except BaseException as error:  # noqa: BLE001 - a reward is foreign code, and what it raises is data here
        try:
            box.append((None, f"{type(error).__name__}: {error}"))
        except BaseException:  # noqa: BLE001 - its text is foreign code too
            box.append((None, type(error).__name__))

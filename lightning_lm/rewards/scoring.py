"""Rewards of a batch of samples: each is called the way its signature asks for, and a failure does not end the run.

A reward may take whole batches (``prompts``, ``completions``, ``completion_ids`` and the data's columns, by name) or
one sample at a time (``prompt``, ``completion`` and the columns), be sync or async, and return a list, an array or a
tensor. A function with one parameter of another name is given the completion.

A reward is foreign code: it may raise anything, hang or return NaN. Each of these is reported with the sample, that one
reward counts as "not applicable" there, and training continues, unless the run was asked to stop. It runs in the
process of the run, which ``os._exit`` or a crash of native code ends; untrusted programs belong in `CodeTests`.
"""

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import numpy as np
import torch

from lightning_lm.errors import ConfigurationError, LightningLMError
from lightning_lm.parts import Limit, Part

__all__ = [
    "RewardError",
    "RewardFailure",
    "RewardTable",
    "Scoring",
    "check_reward",
    "check_weights",
    "reward_name",
    "score",
]

Samples = Mapping[str, Sequence[Any]]
"""``prompts``, ``completions`` and the columns of the data, lists of one item per completion."""

_Outcomes = list[float | str | None]
"""For each sample its reward, ``None`` if it does not apply, or the reason why it failed."""
_BATCH, _SAMPLE = ("prompts", "completions", "completion_ids"), {"prompt": "prompts", "completion": "completions"}
_OFFER = (
    "A reward takes, by name, any of prompts, completions, completion_ids and the columns of the data, as lists with "
    "one item per completion, or prompt, completion and the columns of one sample"
)
_NO_CONVERSATION = ("string indices must be integers", "'str' object has no attribute 'get'")


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


def reward_name(reward: Callable[..., Any]) -> str:
    """Return the name of a reward in logs.

    Args:
        reward: Reward with a ``name``, else the name of the function or of its class is returned.
    """
    inner = getattr(reward, "func", reward)  # functools.partial
    named = getattr(reward, "name", None) or getattr(inner, "__name__", None) or type(reward).__name__
    return str(named)


def check_reward(reward: Any, columns: Collection[str] | None = None) -> None:
    """Refuse a reward that cannot be called with the arguments of rewards.

    Args:
        reward: A function or an object that can be called.
        columns: Names of the data's columns, if they are known.

    Raises:
        ConfigurationError: If it cannot be called, or requires an argument that is not offered.
    """
    if not callable(reward) or isinstance(reward, type):
        remedy = f"an object of it, such as {reward.__name__}()" if isinstance(reward, type) else "a function"
        raise ConfigurationError(f"{reward!r} is not a reward; give {remedy}. {_OFFER}.")
    signature = _signature(reward)
    if signature is None:
        return
    names, name = list(_named(signature)), reward_name(reward)
    if not names:
        raise ConfigurationError(f"The reward {name!r} takes no argument by name. {_OFFER}.")
    if set(names) & set(_SAMPLE) and set(names) & {"prompts", "completions"}:
        raise ConfigurationError(f"The reward {name!r} takes {names}: lists and single samples. {_OFFER}.")
    if columns is None or _only_parameter(signature, columns) is not None:
        return
    missing = sorted(set(_required(signature)) - {*_BATCH, *_SAMPLE, *columns})
    if missing:
        raise ConfigurationError(
            f"The reward {name!r} requires {missing[0]!r}, which is not offered. {_OFFER}. "
            f"This data has the columns {sorted(columns)}. Rename the parameter, give it a default, or add the column."
        )


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
    reward: Callable[..., Any], samples: Samples, scoring: Scoring
) -> tuple[np.ndarray, list[RewardFailure]]:
    """Return one reward's values, NaN where it has none, and its failures."""
    limit_s = None if getattr(reward, "limits_itself", False) else scoring.timeout_s
    values, failures = np.full(len(samples["completions"]), np.nan), []
    for sample, outcome in enumerate(_outcomes(reward, samples, limit_s)):
        if isinstance(outcome, str):
            completion = str(samples["completions"][sample])[:200]
            failures.append(RewardFailure(reward_name(reward), sample, outcome, completion))
        elif outcome is not None:
            values[sample] = outcome
    return values, failures


# --- calls ---


def _outcomes(reward: Callable[..., Any], samples: Samples, timeout_s: float | None) -> _Outcomes:
    """Return the outcome of each sample.

    A reward that raises is called again with one sample at a time. One that hangs is left behind in its thread, and not
    called again: each further call could hang as long.
    """
    box: list[_Outcomes | str] = []
    thread = threading.Thread(target=_call_into, args=(box, reward, samples), daemon=True)
    thread.start()
    thread.join(timeout_s)
    count = len(samples["completions"])
    found: _Outcomes | str = box[0] if box else [f"no result within {timeout_s} s"] * count
    if isinstance(found, list):
        return found
    if count == 1:
        return [found]
    alone = ({name: column[place : place + 1] for name, column in samples.items()} for place in range(count))
    return [outcome for sample in alone for outcome in _outcomes(reward, sample, timeout_s)]


def _call_into(box: list[_Outcomes | str], reward: Callable[..., Any], samples: Samples) -> None:
    """Put the outcome of each sample into a box, or what the reward raised."""
    try:
        box.append([_outcome(value) for value in _call(reward, samples)])
    except _ReturnedValueError as error:
        box.append([str(error)] * len(samples["completions"]))
    except BaseException as error:  # noqa: BLE001 - a reward is foreign code, and what it raises is data here
        try:
            box.append(f"{type(error).__name__}: {error}")
        except BaseException:  # noqa: BLE001 - its text is foreign code too
            box.append(type(error).__name__)


def _outcome(value: Any) -> float | str | None:
    """Return a reward as a float, or why it is none: NaN, a tensor of several numbers, 10 ** 400."""
    try:
        number = value.item() if isinstance(value, torch.Tensor | np.ndarray | np.generic) else value
        if number is None or (isinstance(number, SupportsFloat) and math.isfinite(number)):
            return None if number is None else float(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    return f"it returned {repr(value)[:80]}, and a finite number is needed"


class _ReturnedValueError(ValueError):
    """A reward returned something else than one number per completion."""


def _call(reward: Callable[..., Any], samples: Samples) -> list[Any]:
    """Return one value per completion.

    A function that fails on texts because it was written for conversations (``completion[0]["content"]``) is called
    again with each completion as the list of one assistant message.
    """
    try:
        return _call_once(reward, samples)
    except (TypeError, AttributeError) as error:
        if not any(text in str(error) for text in _NO_CONVERSATION):
            raise
    messages = [[{"role": "assistant", "content": text}] for text in samples["completions"]]
    prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in samples["prompts"]]
    return _call_once(reward, {**samples, "prompts": prompts, "completions": messages})


def _call_once(reward: Callable[..., Any], samples: Samples) -> list[Any]:
    count, signature = len(samples["completions"]), _signature(reward)
    if signature is None:
        return _values(_awaited(reward(**samples)), count)
    only = _only_parameter(signature, samples)
    if _takes_lists(signature, only):
        offered = {**samples, only: samples["completions"]} if only else samples
        return _values(_awaited(_with_arguments(reward, signature, offered)), count)
    calls = []
    for index in range(count):
        sample = {name: column[index] for name, column in samples.items()}
        sample |= {single: sample.pop(name) for single, name in _SAMPLE.items()}
        offered = {**sample, only: sample["completion"]} if only else sample
        calls.append(_with_arguments(reward, signature, offered))
    return list(_awaited(calls))


def _awaited(returned: Any) -> Any:
    """Wait for what an async reward returned, all samples at the same time."""

    async def wait() -> Any:
        if isinstance(returned, list) and all(map(inspect.isawaitable, returned)):
            return await asyncio.gather(*returned)
        return await returned

    waiting = inspect.isawaitable(returned) or (isinstance(returned, list) and any(map(inspect.isawaitable, returned)))
    return asyncio.run(wait()) if waiting else returned


def _values(returned: Any, count: int) -> list[Any]:
    if isinstance(returned, torch.Tensor):
        returned = returned.detach().float().cpu().numpy()
    if isinstance(returned, np.ndarray):
        returned = returned.tolist()
    if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | Mapping | Set):
        shown = repr(returned)[:80]
        raise _ReturnedValueError(f"it returned {shown}, and a list with one number per completion is needed")
    values = list(returned)
    if len(values) != count:
        raise _ReturnedValueError(f"it returned {len(values)} values for {count} samples")
    return values


# --- signatures ---


def _signature(reward: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature, or ``None`` if every name is accepted: ``**columns`` alone, or no signature at all."""
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # a builtin
        return None
    return None if not _named(signature) and _takes_any_name(signature) else signature


def _named(signature: inspect.Signature) -> dict[str, inspect.Parameter]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: parameter for name, parameter in signature.parameters.items() if parameter.kind not in variadic}


def _takes_any_name(signature: inspect.Signature) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values())


def _required(signature: inspect.Signature) -> list[str]:
    named = _named(signature).items()
    return [name for name, parameter in named if parameter.default is inspect.Parameter.empty]


def _only_parameter(signature: inspect.Signature, columns: Collection[str] | None) -> str | None:
    """Return the name of the only parameter if it is not one that is offered: it stands for the completion."""
    names = _required(signature) or list(_named(signature))
    offered = {*_BATCH, *_SAMPLE, *(columns or ())}
    return names[0] if len(names) == 1 and names[0] not in offered else None


def _takes_lists(signature: inspect.Signature, only: str | None) -> bool:
    if only is None:
        return not set(_SAMPLE) & set(_named(signature))
    annotation = signature.parameters[only].annotation
    text = "" if annotation is inspect.Parameter.empty else getattr(annotation, "__name__", str(annotation)).lower()
    return text != "str" if text else only.endswith("s")


def _with_arguments(reward: Callable[..., Any], signature: inspect.Signature, offered: Mapping[str, Any]) -> Any:
    named = _named(signature)
    by_place = [name for name, parameter in named.items() if parameter.kind is inspect.Parameter.POSITIONAL_ONLY]
    wanted = {name: value for name, value in offered.items() if name in named or _takes_any_name(signature)}
    positional = [wanted.pop(name) for name in by_place if name in wanted]
    return reward(*positional, **wanted)

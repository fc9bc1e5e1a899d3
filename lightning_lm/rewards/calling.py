"""Calling a reward the way its signature asks for.

A reward may take whole batches (``prompts``, ``completions``, ``completion_ids`` and the data's columns, by name) or
one sample at a time (``prompt``, ``completion`` and the columns), be sync or async, and return a list, an array or a
tensor. A function with one parameter of another name is given the completion.
"""

import asyncio
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch

from lightning_lm.errors import ConfigurationError

__all__ = ["ReturnedValueError", "call_reward", "check_reward", "reward_name"]

_BATCH, _SAMPLE = ("prompts", "completions", "completion_ids"), {"prompt": "prompts", "completion": "completions"}
_OFFER = (
    "A reward takes, by name, any of prompts, completions, completion_ids and the columns of the data, as lists with "
    "one item per completion, or prompt, completion and the columns of one sample"
)
_NO_CONVERSATION = ("string indices must be integers", "'str' object has no attribute 'get'")


class ReturnedValueError(ValueError):
    """A reward returned something else than one number per completion."""


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


def call_reward(reward: Callable[..., Any], samples: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Return one value per completion.

    A function that fails on texts because it was written for conversations (``completion[0]["content"]``) is called
    again with each completion as the list of one assistant message.

    Args:
        reward: In one of the forms of this module.
        samples: ``prompts``, ``completions`` and the columns, lists of one item per completion.

    Raises:
        ReturnedValueError: If it returns something else than one number per completion.
    """
    try:
        return _call(reward, samples)
    except (TypeError, AttributeError) as error:
        if not any(text in str(error) for text in _NO_CONVERSATION):
            raise
    messages = [[{"role": "assistant", "content": text}] for text in samples["completions"]]
    prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in samples["prompts"]]
    return _call(reward, {**samples, "prompts": prompts, "completions": messages})


def _call(reward: Callable[..., Any], samples: Mapping[str, Sequence[Any]]) -> list[Any]:
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
    return [_number(value) for value in _awaited(calls)]


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
        raise ReturnedValueError(f"it returned {shown}, and a list with one number per completion is needed")
    values = [_number(value) for value in returned]
    if len(values) != count:
        raise ReturnedValueError(f"it returned {len(values)} values for {count} samples")
    return values


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor | np.ndarray | np.generic) and _size(value) == 1 else value


def _size(value: Any) -> int:
    return int(value.numel() if isinstance(value, torch.Tensor) else value.size)


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
    positional = [
        offered[name]
        for name, parameter in named.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and name in offered
    ]
    skipped = {name for name, parameter in named.items() if parameter.kind is inspect.Parameter.POSITIONAL_ONLY}
    wanted = {name: value for name, value in offered.items() if name in named or _takes_any_name(signature)}
    return reward(*positional, **{name: value for name, value in wanted.items() if name not in skipped})

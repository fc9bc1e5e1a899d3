"""Rewards of single-turn environments: the functions of a rubric with the interface of `verifiers` 0.1."""

import importlib.util
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.gym import environment_of
from lightning_lm.rewards.answers import Reward

__all__ = ["EnvironmentReward"]

_OF_GROUPS = {"states", "prompts", "completions", "answers", "tasks", "infos"}


@dataclass(frozen=True, kw_only=True)
class EnvironmentReward(Reward):
    """Weighted sum of the functions of an environment's rubric, for the questions of `data.EnvironmentPrompts`.

    Each function is given those of ``prompt``, ``completion``, ``answer``, ``info``, ``task``, ``state``, the other
    fields of the row and the rubric's own objects (``parser``) that it takes by name; a completion is the list of one
    assistant message where the prompt is a list of messages, else a text. Functions of weight 0 only measure, and are
    not called.

    Args:
        environment: Name of an installed environment, or an object with a ``rubric``.
        arguments: Arguments of its ``load_environment``, for a name.

    Raises:
        ConfigurationError: If a function scores groups of completions together.
    """

    environment: Any = field(kw_only=False)
    arguments: dict[str, Any] = field(default_factory=dict)

    @override
    async def __call__(  # type: ignore[override]
        self, *, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float]:
        """Score each completion."""
        rubric = self._rubric()
        totals = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            fields = {name: column[number] for name, column in columns.items()}
            state = _state(prompt, completion, fields)
            objects = {**fields, **state, **getattr(rubric, "class_objects", {}), "state": state}
            totals.append(sum([weight * await _called(function, objects) for function, weight in _functions(rubric)]))
        return totals

    def _rubric(self) -> Any:
        if not isinstance(self.environment, str):
            return self.environment.rubric
        if importlib.util.find_spec("verifiers") is None:
            raise MissingDependencyError("verifiers==0.1.14", "load an environment by name")
        return environment_of(self.environment, json.dumps(self.arguments)).rubric


def _functions(rubric: Any) -> list[tuple[Callable[..., Any], float]]:
    pairs = [(one, weight) for one, weight in zip(rubric.funcs, rubric.weights, strict=True) if weight]
    for function, _ in pairs:
        if _OF_GROUPS & inspect.signature(function).parameters.keys():
            raise ConfigurationError(
                f"{getattr(function, '__name__', function)} of the rubric scores all completions of a prompt together, "
                "and rewards are of one completion here. Leave it out of the rubric, or give it weight 0."
            )
    return pairs


def _state(prompt: Any, completion: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    said = completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
    defaults = {"answer": "", "info": {}, "task": "default"}
    return {"prompt": prompt, "completion": said, **{name: fields.get(name) or defaults[name] for name in defaults}}


async def _called(function: Callable[..., Any], objects: Mapping[str, Any]) -> float:
    parameters = inspect.signature(function).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    returned = function(**{name: value for name, value in objects.items() if takes_all or name in parameters})
    return float(await returned if isinstance(returned, Awaitable) else returned)

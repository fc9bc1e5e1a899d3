"""Prompts of single-turn environments: anything with the interface of `verifiers` 0.1, a dataset and a rubric.

What was simplified: one question and one answer. Environments with several turns or with tools are refused.

Source:
    https://github.com/PrimeIntellect-ai/verifiers
"""

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

from lightning_lm.data.post_training.examples import ExampleSource, Record
from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.gym import environment_of

__all__ = ["EnvironmentPrompts"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvironmentPrompts(ExampleSource):
    """Questions of a single-turn environment; `rewards.EnvironmentReward` scores the answers.

    Fields: ``prompt`` (messages), and those of the environment's rows, such as ``answer``, ``info`` and ``task``.

    Args:
        environment: Name of an installed environment, or an object with ``get_dataset``, ``get_eval_dataset`` and
            ``rubric``.
        arguments: Arguments of its ``load_environment``, for a name.
        held_out: Give the environment's evaluation dataset.

    Example:
        >>> source = EnvironmentPrompts(environment="gsm8k", arguments={"num_train_examples": 500})
    """

    environment: Any = dataclasses.field(kw_only=False)
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    held_out: bool = False

    def records(self) -> Iterator[Record]:
        """Yield the rows of the dataset, without fields that are empty.

        Raises:
            MissingDependencyError: If a name is given and `verifiers` is not installed.
            ConfigurationError: If the environment has several turns or tools, or no dataset of its own to evaluate on.
        """
        opened = self._opened()
        rows = opened.get_eval_dataset() if self.held_out else opened.get_dataset()
        if self.held_out and getattr(opened, "eval_dataset", rows) is None:
            raise ConfigurationError(
                f"The environment {self.environment!r} has no evaluation dataset and would give its training dataset. "
                "Hold out a part of that instead: --data.validation 0.1."
            )
        return ({name: value for name, value in row.items() if value is not None} for row in rows)

    def _opened(self) -> Any:
        if not isinstance(self.environment, str):
            opened = self.environment
        elif importlib.util.find_spec("verifiers") is None:
            raise MissingDependencyError("verifiers==0.1.14", "load an environment by name")
        else:
            opened = environment_of(self.environment, json.dumps(self.arguments))
        turns, tools = getattr(opened, "max_turns", 1), getattr(opened, "tool_defs", None)
        if turns != 1 or tools:
            what = f"has tools ({len(tools)})" if tools else f"has max_turns={turns}"
            raise ConfigurationError(
                f"The environment {self.environment!r} {what}, and completions are single answers here. Take one with "
                "a single turn, or write the turns into the prompts."
            )
        return opened

"""Datasets of Reasoning Gym by name, and the process that runs their verifiers, some of which evaluate an answer.

The sandbox is given this file as a program by `rewards.reasoning_gym`: nothing of this package can be imported here.
The first line on standard input is the import path as JSON; each further line is a JSON object with ``task``,
``config``, ``entry`` (pickled) and ``answer``. Each line of output is the score, or a text that says why there is none.
"""

import base64
import enum
import functools
import importlib
import json
import math
import os
import pickle
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["create_dataset", "dataset_of", "environment_of", "main", "score_answer"]


@functools.lru_cache(maxsize=64)
def dataset_of(task: str, config: str) -> Any:
    """Return the dataset of a task.

    Args:
        task: Name of the task.
        config: All its settings, as JSON.
    """
    return create_dataset(task, json.loads(config))


def create_dataset(task: str, config: Mapping[str, Any]) -> Any:
    """Return the dataset of a task; names of an enumeration's members, as JSON and YAML have them, become members.

    Args:
        task: Name of the task.
        config: All its settings.
    """
    import reasoning_gym.factory

    defaults = reasoning_gym.factory.DATASETS[task][1]()
    settings = {name: _as_in(getattr(defaults, name, None), value) for name, value in config.items()}
    return reasoning_gym.factory.create_dataset(task, **settings)


def _as_in(default: Any, value: Any) -> Any:
    if isinstance(default, enum.Enum) and isinstance(value, str):
        return type(default)(value)
    if isinstance(default, list | tuple) and default and isinstance(value, list | tuple):
        return [_as_in(default[0], item) for item in value]
    return value


@functools.lru_cache(maxsize=8)
def environment_of(name: str, arguments: str) -> Any:
    """Return an environment of `verifiers` by name; prompts and reward of a run share it.

    Args:
        name: Name of an installed environment.
        arguments: Arguments of its ``load_environment``, as JSON.
    """
    return importlib.import_module("verifiers").load_environment(name, **json.loads(arguments))


def score_answer(dataset: Any, entry: dict[str, Any], answer: str) -> float | str:
    """Return the verifier's score, or a text if the verifier fails on every answer.

    Args:
        dataset: The dataset that the entry is from.
        entry: Question, answer and metadata.
        answer: Answer to score. One on which the verifier raises is wrong: many cannot be read.
    """
    try:
        score = float(dataset.score_answer(answer, entry))
        return score if math.isfinite(score) else 0.0
    except Exception:  # noqa: BLE001 - a verifier is foreign code that may raise anything on a malformed answer
        reason = _failure_on_right_answer(dataset, entry)
        return 0.0 if reason is None else reason


def _failure_on_right_answer(dataset: Any, entry: dict[str, Any]) -> str | None:
    try:
        dataset.score_answer(entry["answer"], entry)
    except Exception as error:  # noqa: BLE001
        return f"the verifier fails on its own answer: {type(error).__name__}: {error}"
    return None


def main() -> None:
    """Answer requests until standard input ends."""
    # Expressions that print must not be taken for scores.
    scores = os.dup(1)
    os.dup2(2, 1)
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:] = json.loads(sys.stdin.readline())
    import reasoning_gym  # noqa: F401

    os.write(scores, b"ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        entry = pickle.loads(base64.b64decode(request["entry"]))
        found = score_answer(dataset_of(request["task"], request["config"]), entry, request["answer"])
        os.write(scores, json.dumps(found).encode() + b"\n")


if __name__ == "__main__":
    main()

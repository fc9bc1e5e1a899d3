"""Prompts of Reasoning Gym: tasks that a program generates, of any difficulty and in any number, each with a verifier.

Source:
    Stojanovski et al. 2025, arXiv:2505.24760; https://github.com/open-thought/reasoning-gym
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lightning_lm.data.mixture import Interleaving
from lightning_lm.data.permutation import key_of
from lightning_lm.data.post_training.examples import ExampleSource, Record
from lightning_lm.errors import ConfigurationError, DataError, MissingDependencyError
from lightning_lm.gym import create_dataset

__all__ = ["ReasoningGym"]

Create = Callable[[Mapping[str, Any]], Any]

_CHUNK = 500
"""Questions of one seed. Reasoning Gym seeds question ``i`` with ``seed + i``, so that near seeds repeat questions."""
_HELD_OUT = 0.1
"""Fraction of the questions that is never trained on."""
_PATIENCE = 1000
"""Questions in a row that are all known already or on the other side, after which there are no more."""
_HASHED = (
    "isomorphic_strings",
    "knight_swap",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
)
"""Tasks that iterate over sets of text, whose order changes from process to process."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningGym(ExampleSource):
    """Questions of one or more tasks of Reasoning Gym, no question twice. `rewards.ReasoningGymAnswer` scores them.

    Fields: ``prompt`` and ``question`` (the same text), ``answer`` (one that is right), and what the question is made
    again from: ``task``, ``config`` (with the seed) and ``index``. A tenth of all questions, chosen by a hash of their
    text, is held out: the same questions whatever the seed, the settings or the level.

    Args:
        task: Name of a task, or several, each with its weight in the mixture.
        size: Number of questions.
        seed: Seed of the questions.
        config: Settings of the task; if there are several tasks, settings by name of the task.
        level: Difficulty in the task's own curriculum, from 0; ``config`` overrides its settings. ``None`` for the
            default settings.
        held_out: Give held-out questions.

    Raises:
        ConfigurationError: If a number is out of range.

    Example:
        >>> source = ReasoningGym(task={"chain_sum": 3, "gcd": 1}, size=400, config={"chain_sum": {"max_terms": 3}})
    """

    task: str | dict[str, float] = dataclasses.field(kw_only=False)
    size: int = 1000
    seed: int = 0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    level: int | None = None
    held_out: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigurationError(f"size={self.size} must be at least 1.")
        if self.level is not None and self.level < 0:
            raise ConfigurationError(f"level={self.level} must be at least 0.")
        if not isinstance(self.task, str):
            Interleaving(tuple(self.task.values()))
            unknown = sorted(set(self.config) - set(self.task))
            if unknown:
                raise ConfigurationError(
                    f"config has {unknown[0]!r}, which is none of the tasks {sorted(self.task)}. With several tasks, "
                    "config has the settings of each under its name."
                )

    def records(self) -> Iterator[Record]:
        """Yield the questions.

        Raises:
            MissingDependencyError: If Reasoning Gym is not installed.
            ConfigurationError: If a task or one of its settings does not exist.
            DataError: If the tasks have fewer different questions.
        """
        weights = {self.task: 1.0} if isinstance(self.task, str) else self.task
        streams = [self._of_task(name, *_checked(name, self._config(name), self.level)) for name in weights]
        order, _ = Interleaving(tuple(weights.values())).locate(np.arange(self.size))
        return (next(streams[which]) for which in order.tolist())

    def _config(self, task: str) -> Mapping[str, Any]:
        return self.config if isinstance(self.task, str) else self.config.get(task, {})

    def _of_task(self, task: str, create: Create, config: Mapping[str, Any]) -> Iterator[Record]:
        """Yield the distinct questions of this side, endlessly."""
        seen: set[bytes] = set()
        passed = 0
        for chunk in itertools.count():
            settings = {**config, "seed": key_of("reasoning gym", task, self.seed, chunk) % 2**31, "size": _CHUNK}
            dataset = create(settings)
            for index in range(_CHUNK):
                entry = dataset[index]
                digest = hashlib.sha256(entry["question"].encode()).digest()
                passed += 1
                if digest not in seen and (int.from_bytes(digest[:4]) < _HELD_OUT * 2**32) is self.held_out:
                    seen.add(digest)
                    passed = 0
                    yield _record(task, settings, index, entry)
                if passed >= _PATIENCE:
                    raise self._exhausted(task, len(seen))

    def _exhausted(self, task: str, found: int) -> DataError:
        side = "held-out questions" if self.held_out else "questions to train on"
        return DataError(
            f"{task} has only {found} different {side} with config={dict(self._config(task))}, and size={self.size} "
            f"needs more: the last {_PATIENCE} were all known. Lower size, or change the config (or level) so that "
            "more are possible."
        )


def _record(task: str, config: Mapping[str, Any], index: int, entry: Mapping[str, Any]) -> Record:
    question = entry["question"]
    made = {"task": task, "config": dict(config), "index": index}
    return {"prompt": question, "question": question, "answer": entry["answer"], **made}


def _checked(task: str, config: Mapping[str, Any], level: int | None) -> tuple[Create, dict[str, Any]]:
    """Return the function that makes a task's dataset, and all its settings but seed and size."""
    try:
        factory = importlib.import_module("reasoning_gym.factory")
        importlib.import_module("reasoning_gym")  # registers the tasks
    except ImportError as error:
        raise MissingDependencyError("reasoning-gym", "generate its questions", "gym") from error
    names = sorted(set(factory.DATASETS) - {"composite"})
    if task not in names:
        near = difflib.get_close_matches(task, names, n=2, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"The tasks are: {', '.join(names)}."
        raise ConfigurationError(f"Reasoning Gym has no task {task!r}. {hint}")
    if task in _HASHED and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ConfigurationError(
            f"The questions of {task} depend on Python's hash seed, which changes from process to process: no run "
            "could be resumed. Set it: PYTHONHASHSEED=0 lightning-lm fit ..."
        )
    known = [field.name for field in dataclasses.fields(factory.DATASETS[task][1])]
    known = [name for name in known if name not in ("seed", "size")]
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ConfigurationError(f"{task} has no setting {unknown[0]!r}. Its settings are: {', '.join(known)}.")
    settings = {**_level_settings(factory, task, level), **config}
    create = functools.partial(_create, task)
    create({**settings, "seed": 0, "size": _CHUNK})
    return create, settings


def _level_settings(factory: Any, task: str, level: int | None) -> dict[str, Any]:
    if level is None:
        return {}
    if not factory.has_curriculum(task):
        raise ConfigurationError(f"{task} has no levels. Leave level out, and set its difficulty with config.")
    curriculum = factory.create_curriculum(task)
    top = max((len(attribute.levels) for attribute in curriculum.attributes.values()), default=1) - 1
    if level > top:
        raise ConfigurationError(f"level={level} is above the highest level of {task}, {top}.")
    curriculum.set_global_level(level)
    settings = dataclasses.asdict(curriculum.generate_configuration({"seed": 0, "size": _CHUNK}))
    return {name: value for name, value in settings.items() if name not in ("seed", "size")}


def _create(task: str, settings: Mapping[str, Any]) -> Any:
    try:
        return create_dataset(task, settings)
    except (AssertionError, TypeError, ValueError) as error:
        given = {name: value for name, value in settings.items() if name not in ("seed", "size")}
        raise ConfigurationError(f"{task} refuses the config {given}: {error}. Change that setting.") from error

"""Tasks by name, and from YAML files."""

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.evals.reasoning import ChainOfThought
from lightning_lm.evals.task import Task
from lightning_lm.evals.tasks.few_shot import FirstShots, Shots
from lightning_lm.evals.tasks.ifeval import IFEval
from lightning_lm.evals.tasks.mmlu import MMLU, MMLUPro
from lightning_lm.evals.tasks.multiple_choice import ARC, PIQA, BoolQ, HellaSwag, OpenBookQA, WinoGrande
from lightning_lm.evals.tasks.programs import MBPP, HumanEval
from lightning_lm.evals.tasks.questions import GSM8K, MATH, TriviaQA
from lightning_lm.evals.tasks.record_task import RecordTask
from lightning_lm.evals.tasks.standard_library import DocsChoice, DocsCloze
from lightning_lm.evals.tasks.synthetic import Arithmetic, Reverse
from lightning_lm.evals.tasks.texts import LAMBADA, WikiText
from lightning_lm.parts import Part

__all__ = ["by_name", "configured", "names", "task_from_settings", "task_from_yaml"]

_TASKS: dict[str, tuple[Callable[[], Task], str]] = {
    "arc_challenge": (
        functools.partial(ARC, name="arc_challenge", subset=("ARC-Challenge",)),
        "science questions of school examinations, the hard ones",
    ),
    "arc_easy": (functools.partial(ARC, name="arc_easy", subset=("ARC-Easy",)), "the easy ones"),
    "arithmetic": (Arithmetic, "sums, differences and products, 3 examples; needs no data"),
    "boolq": (BoolQ, "questions about a passage, yes or no"),
    "docs_choice": (DocsChoice, "the description of a function of Python's library, of four; needs no data"),
    "docs_cloze": (DocsCloze, "the last word of such a description; needs no data"),
    "gsm8k": (GSM8K, "word problems of grade school, 5 examples"),
    "hellaswag": (HellaSwag, "the likeliest of four endings"),
    "humaneval": (HumanEval, "Python functions from docstrings, run in the sandbox"),
    "ifeval": (IFEval, "prompts with instructions that a program can verify"),
    "lambada": (LAMBADA, "the last word of a passage"),
    "math": (MATH, "problems of mathematical competitions, 4 examples"),
    "mbpp": (MBPP, "short Python programs from descriptions, run in the sandbox, 3 examples"),
    "mmlu": (MMLU, "questions about 57 subjects, four choices, 5 examples"),
    "mmlu_pro": (MMLUPro, "questions with ten choices, answered with reasoning, 5 examples"),
    "openbookqa": (OpenBookQA, "elementary science facts, four choices"),
    "piqa": (PIQA, "the way that reaches a goal, of two"),
    "reverse": (Reverse, "numbers to reverse; needs no data"),
    "triviaqa": (TriviaQA, "trivia questions without documents"),
    "wikitext": (WikiText, "perplexity of articles of Wikipedia"),
    "winogrande": (WinoGrande, "the name that fills a gap, of two"),
}


def names() -> dict[str, str]:
    """Return the names of the tasks that come with the package, each with a description in a few words."""
    return {name: description for name, (_, description) in sorted(_TASKS.items())}


def by_name(name: str, *, data: str | Path | None = None, shots: int | None = None, **settings: Any) -> Task:
    """Return a task that comes with the package, or the one that a YAML file describes.

    Args:
        name: One of `names`, or the path of a YAML file.
        data: Folder with the task's data, or with a folder for each task.
        shots: Number of examples before each question; by default the task's own.
        **settings: Fields of the task to replace, such as ``split``, ``vote`` or ``num_samples`` (also ``samples``).

    Raises:
        ConfigurationError: If there is no such task, or it has no such field.
        DataError: If a YAML file cannot be read.
    """
    if name in _TASKS:
        task = _TASKS[name][0]()
    elif name.endswith((".yaml", ".yml")):
        task = task_from_yaml(name)
    else:
        near = difflib.get_close_matches(name.lower(), _TASKS, n=1, cutoff=0.5)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(
            f"There is no task {name!r}.{meant} There are {', '.join(names())}; name a YAML file of "
            "your own by its path."
        )
    return configured(task, data=data, shots=shots, **settings)


def configured(task: Task, *, data: str | Path | None = None, shots: Any = None, **settings: Any) -> Task:
    """Return a task with other values for some of its fields.

    Args:
        task: The task.
        data: Folder with the task's data; passed over by a task that needs none.
        shots: Number of examples before each question, or a way to choose them.
        **settings: Values by field; parts may be described by ``class_path`` and ``init_args``. Also ``samples``, for
            ``num_samples``, and ``chain_of_thought=True``, for the reasoning of `ChainOfThought`.

    Raises:
        ConfigurationError: If it has no such field, or a part is unknown.
    """
    settings = {name: _built(value) for name, value in settings.items()}
    if data is not None:
        settings["data"] = str(data)
    if "samples" in settings:
        settings["num_samples"] = settings.pop("samples")
    if settings.pop("chain_of_thought", False):
        settings.setdefault("reasoning", ChainOfThought())
    if shots is not None:
        settings["shots"] = _shots(task, _built(shots))
    fields = {field.name for field in dataclasses.fields(task)}
    wanted = {name: value for name, value in settings.items() if name != "data" or name in fields}
    unknown = sorted(wanted.keys() - fields)
    if unknown:
        raise ConfigurationError(
            f"The task {task.name!r} ({type(task).__name__}) has no {', '.join(unknown)}; it has "
            f"{', '.join(sorted(fields))}."
        )
    return dataclasses.replace(task, **wanted) if wanted else task


def _shots(task: Task, given: Any) -> Shots:
    if isinstance(given, int) and not isinstance(given, bool):
        return dataclasses.replace(getattr(task, "shots", FirstShots()), num=given)
    if not isinstance(given, Shots):
        raise ConfigurationError(f"shots={given!r} must be a number of examples, or a part such as RandomShots.")
    return given


def _built(value: Any) -> Any:
    """Return a value with the parts that it describes."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            return Part.from_dict(_as_part(value))
        return {key: _built(item) for key, item in value.items()}
    return [_built(item) for item in value] if isinstance(value, list) else value


def task_from_yaml(path: str | Path) -> Task:
    """Return the task that a file describes: ``class_path`` and ``init_args``, for its parts too.

    Args:
        path: File.

    Raises:
        ConfigurationError: If it describes no task.
        DataError: If it cannot be read.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"The task {path} cannot be read: {error}.") from error
    try:
        return task_from_settings(content, folder=Path(path).parent)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path} describes no task: {error}") from error


def task_from_settings(settings: Any, *, folder: Path = Path()) -> Task:
    """Return the task that ``class_path`` and ``init_args`` describe, for its parts too.

    Args:
        settings: The description. A class that is named with its module, as ``my_tasks.Riddles``, is imported.
        folder: Folder in which relative data are looked for first.

    Raises:
        ConfigurationError: If it describes no task.
    """
    if not isinstance(settings, Mapping) or "class_path" not in settings:
        raise ConfigurationError("a task needs class_path, such as ChoiceTask, and init_args with at least a name.")
    try:
        task = Task.from_dict(_as_part(settings))
    except TypeError as error:
        raise ConfigurationError(str(error)) from error
    if isinstance(task, RecordTask) and task.data and (folder / task.data).exists():
        return dataclasses.replace(task, data=str(folder / task.data))
    return task


def _as_part(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_part(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        return {key: _as_part(item) for key, item in value.items()}
    module, _, name = str(value["class_path"]).rpartition(".")
    try:
        if module and not hasattr(importlib.import_module(module), name):
            raise ConfigurationError(f"{module} has no class {name!r}.")
    except ImportError as error:
        raise ConfigurationError(f"{value['class_path']} cannot be imported: {error}.") from error
    return {"part": name, **{key: _as_part(item) for key, item in (value.get("init_args") or {}).items()}}

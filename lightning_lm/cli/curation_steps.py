"""The pipeline of a recipe: each step built of its class path and arguments."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import jsonargparse

from lightning_lm import curation
from lightning_lm.curation import Pipeline, Reading
from lightning_lm.errors import ConfigurationError, UsageError

__all__ = ["build_pipeline"]


def build_pipeline(settings: Mapping[str, Any]) -> Pipeline:
    """Return the pipeline that settings describe.

    Args:
        settings: ``steps``, a list of class paths with their arguments, and ``reading``.

    Raises:
        UsageError: If a step is unknown, or does not take its arguments.
    """
    steps = settings.get("steps") or []
    if not isinstance(steps, list):
        raise UsageError(f"steps: must be a list of steps, such as `- Extract`, got {type(steps).__name__}.")
    reading = settings.get("reading") or {}
    if not isinstance(reading, Mapping):
        raise UsageError(f"reading: must have keys such as `field:`, got {reading!r}.")
    built = [_step(item, f"step {number}") for number, item in enumerate(steps, start=1)]
    return Pipeline(built, _built(Reading, reading, "reading"))


def _step(item: Any, place: str) -> Any:
    if isinstance(item, str):
        item = {"class_path": item}
    if not isinstance(item, Mapping) or not isinstance(item.get("class_path"), str):
        raise UsageError(f"{place} of the pipeline has no class_path, got {item!r}. Write `- Extract`, for example.")
    unknown = item.keys() - {"class_path", "init_args"}
    path = item["class_path"]
    if unknown:
        raise UsageError(f"{place}, {path}: {min(unknown)!r} belongs below init_args:.")
    found = _found(path, place)
    arguments = item.get("init_args") or {}
    if inspect.isclass(found):
        return _built(found, arguments, f"{place}, {path}")
    if arguments:
        raise UsageError(f"{place}, {path} is a function, which takes no init_args. Write a class for settings.")
    return found


def _found(path: str, place: str) -> Any:
    module, _, name = path.rpartition(".")
    if not module:
        if name in curation.__all__:
            return getattr(curation, name)
        near = difflib.get_close_matches(name, curation.__all__, n=1)
        advice = f" Did you mean {near[0]}?" if near else " A step of your own is named with its module: my_steps.name."
        raise UsageError(f"{place}: there is no step {name!r}.{advice}")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise UsageError(f"{place}, {path}: {error}. Modules are looked for in the current folder too.") from error
    except AttributeError as error:
        raise UsageError(f"{place}, {path}: the module {module} has no {name}.") from error


def _built(cls: type, arguments: Mapping[str, Any], place: str) -> Any:
    """Return an object of a class, its arguments checked and converted by their annotations."""
    names = list(inspect.signature(cls.__init__).parameters)[1:]  # type: ignore[misc]
    for name in arguments:
        if name not in names and "kwargs" not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            advice = f" Did you mean {near[0]!r}?" if near else f" It takes: {', '.join(names) or 'none'}."
            raise UsageError(f"{place}: {cls.__name__} has no argument {name!r}.{advice}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "step")
    try:
        config = parser.parse_object({"step": dict(arguments)})
        return parser.instantiate(config).step
    except jsonargparse.ArgumentError as error:
        raise UsageError(f"{place}: {str(error).strip()}") from error
    except ConfigurationError as error:
        raise UsageError(f"{place}: {error}") from error

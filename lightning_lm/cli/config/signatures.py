"""Signature of a class as a configuration sees it: names, types and defaults of its arguments."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Any

from jsonargparse import ArgumentParser

__all__ = ["Argument", "accepted_classes", "accepts_text", "arguments_of", "subclasses_by_name"]

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_PLAIN = (bool, int, float, complex, bytes, NoneType, list, tuple, dict, set, frozenset, object)


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument of a class.

    Args:
        annotation: Its type; ``Any`` where that is unknown.
        default: Its default, or ``None``.
    """

    annotation: Any
    default: Any = None


def arguments_of(target: Callable[..., Any]) -> dict[str, Argument] | None:
    """Return the arguments of a class or function by name, or ``None`` if it takes any.

    A constructor that takes ``**settings`` is taken to pass them on to that of the next class above. If it does not, as
    `DDPStrategy` gives them to torch's wrapper, the names that jsonargparse finds are added.

    Args:
        target: A class, or a function that builds something.
    """
    found: dict[str, Argument] = {}
    is_passed_up = True
    for function in _constructors(target):
        hints, parameters = _hints(function), inspect.signature(function).parameters.values()
        for parameter in parameters:
            if parameter.name != "self" and parameter.kind not in _VARIADIC:
                default = _default(target, parameter)
                found.setdefault(parameter.name, Argument(hints.get(parameter.name, Any), default))
        rest = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        is_passed_up = is_passed_up and all(_passes_up(function, name) for name in rest)
        if not rest:
            return found if is_passed_up else _names_of_jsonargparse(target) | found
    return None


def accepted_classes(annotation: Any) -> list[type]:
    """Return the classes of which an annotation takes instances, containers and unions opened, plain data left out.

    Args:
        annotation: For example ``list[Callback] | Callback | None``, which gives ``[Callback]``.
    """
    leaves = dict.fromkeys(_leaves(annotation))
    return [leaf for leaf in leaves if isinstance(leaf, type) and leaf not in (*_PLAIN, str, Any)]


def accepts_text(annotation: Any) -> bool:
    """Tell whether a bare word can be meant as it is, and not as the name of a class.

    Args:
        annotation: The type of an argument.
    """
    return any(leaf in (str, Any) or not isinstance(leaf, type) for leaf in _leaves(annotation))


def subclasses_by_name(bases: list[type]) -> dict[str, type]:
    """Return every known class below (and including) the given ones by its short name.

    Args:
        bases: Base classes to start from.
    """
    found: dict[str, type] = {}
    waiting, seen = list(bases), set(bases)
    while waiting:
        cls = waiting.pop(0)
        if not cls.__name__.startswith("_"):
            found.setdefault(cls.__name__, cls)
        children: list[type] = type.__subclasses__(cls)
        below = [child for child in children if child not in seen]
        seen.update(below)
        waiting += below
    return found


def _constructors(target: Callable[..., Any]) -> list[Callable[..., Any]]:
    if not isinstance(target, type):
        return [target]
    return [vars(cls)["__init__"] for cls in target.__mro__ if cls is not object and "__init__" in vars(cls)]


def _names_of_jsonargparse(target: Callable[..., Any]) -> dict[str, Argument]:
    names = ArgumentParser().add_class_arguments(target, "cls", fail_untyped=False)
    return {name.removeprefix("cls."): Argument(Any) for name in names}


def _passes_up(function: Callable[..., Any], name: str) -> bool:
    """Return whether a constructor gives its ``**name`` to that of the class above, as far as its source tells."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return True
    return re.search(rf"super\([^)]*\)\.__init__\([^)]*\*\*{name}\b", source) is not None


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}  # annotations that exist for a type checker only: every value is let through


def _default(target: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    if dataclasses.is_dataclass(target):
        field = next((field for field in dataclasses.fields(target) if field.name == parameter.name), None)
        if field is not None and field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return None if parameter.default is inspect.Parameter.empty else parameter.default


def _leaves(annotation: Any) -> Iterator[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        yield str
    elif origin is Callable:
        yield Any
    elif not arguments:
        yield annotation
    else:
        for argument in arguments:
            if argument is not Ellipsis:
                yield from _leaves(argument)

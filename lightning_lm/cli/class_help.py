"""``--KEY.help`` and ``--KEY.help CLASS``: the arguments of a class, or the classes that fit there.

jsonargparse prints every subclass of a type beside each option, which for a model are all the layers of torch.
"""

import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import docstring_parser
from torch import nn

from lightning_lm.cli.config.signatures import Argument, accepted_classes, arguments_of, subclasses_by_name
from lightning_lm.parts import Part

__all__ = ["class_help", "names_help"]

_WIDTHS = (60, 100)
_REQUIRED = inspect.Parameter.empty


def class_help(cls: type, key: str, *, ours: bool = True) -> str:
    """Return what a class is for and what it takes, an option a paragraph.

    Args:
        cls: The class.
        key: Dotted path of the option that takes it.
        ours: Print whole descriptions; otherwise as much of their first sentences as fits on a line.
    """
    texts = _descriptions(cls)
    summary, arguments = _summary(cls), arguments_of(cls) or {}
    lines = [*_wrapped(f"{cls.__name__}: {summary}" if summary else cls.__name__, ""), ""]
    for name, argument in arguments.items():
        text = texts.get(name, "")
        text = text if ours else _first_sentence(text)
        option = _option(f"--{key}.{name}", argument, text, _is_required(cls, name))
        lines += option if ours else _shortened(option)
    return "\n".join(lines)


def names_help(argument: Argument, key: str) -> str:
    """Return the classes that fit an option, a line each.

    Args:
        argument: The argument that the option sets.
        key: Dotted path of the option.
    """
    known = _choices(argument.annotation)
    width = max(map(len, known), default=0)
    lines = [f"--{key} takes {_type(argument.annotation)}."]
    if nn.Module in accepted_classes(argument.annotation):
        lines.append("  The import path of a torch.nn.Module, such as my_file.MyModel, or one of:")
    lines += [_fitted(f"  {name:<{width}}  {_first_sentence(_summary(cls))}") for name, cls in known.items()]
    return "\n".join([*lines, f"Arguments of a class: --{key}.help NAME"]) if known else lines[0]


def _option(flag: str, argument: Argument, text: str, required: bool) -> list[str]:
    default = "required" if required else f"default {_value(argument.default)}"
    choices = list(_choices(argument.annotation))
    if len(choices) > 1:
        shown = choices if len(choices) <= 8 else [*choices[:8], f"... ({flag}.help)"]
        text = f"{text} One of {', '.join(shown)}.".lstrip()
    return [_fitted(f"  {flag} {_type(argument.annotation)}  ({default})"), *_wrapped(text, " " * 6)]


def _shortened(option: list[str]) -> list[str]:
    """Return an option on one line if its text fits beside it, else on two; a default of null goes without saying."""
    head, *text = option[0].replace("|null  (default null)", ""), *option[1:]
    first = " ".join(line.strip() for line in text)
    joined = f"{head}  {first}"
    return [joined] if len(joined) <= _width() else [head, _fitted(f"      {first}")]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _fitted(line: str) -> str:
    return line if len(line) <= _width() else line[: _width() - 4].rstrip() + " ..."


def _width() -> int:
    low, high = _WIDTHS
    return min(max(shutil.get_terminal_size().columns - 1, low), high)


def _choices(annotation: Any) -> dict[str, type]:
    """Return the classes that can be named: no base of others, no private ones, and not every layer of torch."""
    bases = [base for base in accepted_classes(annotation) if base is not nn.Module]
    known = {name: cls for name, cls in sorted(subclasses_by_name(bases).items()) if _is_offered(cls)}
    return {name: cls for name, cls in known.items() if cls not in bases} or known


def _is_offered(cls: type) -> bool:
    foreign = cls.__module__.split(".")[0] in ("torch", "pathlib", "builtins", "collections")
    return bool(cls.__doc__) and not (foreign or inspect.isabstract(cls) or getattr(cls, "_is_protocol", False))


def _type(annotation: Any) -> str:
    """Return a type as a user would write its values."""
    if annotation is Any or annotation is inspect.Parameter.empty:
        return "VALUE"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return "|".join(dict.fromkeys(map(_type, arguments)))
    if origin is Callable or annotation is Callable:
        return "FUNCTION"
    if origin is not None:
        inner = ", ".join(_type(argument) for argument in arguments if argument is not Ellipsis)
        return f"[{inner}, ...]" if issubclass(origin, Sequence | set) else f"{{{inner}}}"
    if annotation is types.NoneType:
        return "null"
    name: str = annotation.__name__
    return {"bool": "true|false", "str": "TEXT", "Path": "PATH"}.get(name, name)


def _value(value: Any) -> str:
    if isinstance(value, Part):
        changed = {name: item for name, item in vars(value).items() if _differs(value, name, item)}
        return f"{type(value).__name__}({', '.join(f'{name}={_value(item)}' for name, item in changed.items())})"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, str | int | float | tuple | list | dict) else type(value).__name__


def _differs(part: Part, name: str, item: Any) -> bool:
    argument = (arguments_of(type(part)) or {}).get(name)
    return argument is not None and argument.default != item


def _is_required(cls: type, name: str) -> bool:
    parameter = inspect.signature(cls).parameters.get(name)
    return parameter is not None and parameter.default is _REQUIRED


def _descriptions(cls: type) -> dict[str, str]:
    """Return the text of each argument by name; a class's own comes before that of the classes above it."""
    found: dict[str, str] = {}
    for base in cls.__mro__[:-1]:
        for documented in (base, vars(base).get("__init__")):
            if documented is not None:
                for parameter in docstring_parser.parse_from_object(documented).params:
                    found.setdefault(parameter.arg_name, _plain(parameter.description or ""))
    return found


def _summary(cls: type) -> str:
    """Return the first paragraph of a docstring; Lightning's Trainer has its own in the constructor."""
    text = cls.__doc__ or vars(cls).get("__init__", cls).__doc__ or ""
    return _plain(inspect.cleandoc(text).split("\n\n")[0])


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def _plain(text: str) -> str:
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split()))
    return text.replace("``", "").replace("`", "")

"""Finds misspelt keys and class names before anything is parsed, and says where they stand.

jsonargparse refuses them too, but after one line for each alternative that it tried. What this check cannot know
(a class that takes ``**kwargs``, an annotation it cannot read) it lets through.
"""

import difflib
import importlib
import math
import re
import types
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_lm.cli.config.overlays import Place, Setting, placed
from lightning_lm.cli.config.signatures import (
    Argument,
    accepted_classes,
    accepts_text,
    arguments_of,
    subclasses_by_name,
)
from lightning_lm.cli.config.yaml_text import SETTINGS_SUFFIXES, read_value
from lightning_lm.deprecation import new_argument
from lightning_lm.errors import UsageError

__all__ = ["Checker", "command_line_settings", "with_new_names"]

_CONSTANTS = ("null", "none", "true", "false")
_APPENDED = "[+]"
_SPEC = ("class_path", "init_args", "dict_kwargs")


def command_line_settings(words: Iterable[str]) -> Setting:
    """Return ``--a.b value`` options as the nested settings that they stand for.

    Args:
        words: The command line after the verb; ``--config`` is passed over.
    """
    root: dict[str, Setting] = {}
    rest = list(words)
    for index, word in enumerate(rest):
        if not word.startswith("--") or word == "--":
            continue
        name, equals, value = word[2:].partition("=")
        if not equals and index + 1 < len(rest) and not rest[index + 1].startswith("--"):
            value = rest[index + 1]
        if name != "config" and name.split(".")[-1] != "help":
            _insert(root, name.split("."), _command_line_value(value))
    return Setting(root)


def with_new_names(words: Iterable[str], renamed: Mapping[str, str]) -> list[str]:
    """Return a command line with the new names of keys that were renamed.

    Args:
        words: The command line after the verb, an option and its value in one word or in two.
        renamed: New name of each old key, by the dotted path of `Checker.renamed`.
    """
    found, path = [], ""
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            *above, last = name.removeprefix("--").split(".")
            path = _path_of([*above, last])
            if path in renamed:
                name = ".".join([name.rpartition(".")[0], renamed[path]])
            found.append(name + equals + (_renamed_value(value, path, renamed) if equals else ""))
        else:
            found.append(_renamed_value(word, path, renamed))
    return found


def _path_of(keys: Iterable[str]) -> str:
    """Return the dotted path of keys without ``init_args`` and the places of items."""
    return ".".join(re.sub(r"\[.*\]|\+$", "", key) for key in keys if key != "init_args")


def _renamed_value(text: str, path: str, renamed: Mapping[str, str]) -> str:
    if text[:1] not in ("[", "{"):
        return text
    value = read_value(text)
    new = _renamed_keys(value, path, renamed)
    return text if new == value else yaml.safe_dump(new, default_flow_style=True, width=math.inf).strip()


def _renamed_keys(value: Any, path: str, renamed: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed_keys(item, path, renamed) for item in value]
    if not isinstance(value, dict):
        return value
    below = {key: _path_of([*filter(None, [path]), str(key)]) for key in value}
    return {renamed.get(below[key], key): _renamed_keys(item, below[key], renamed) for key, item in value.items()}


class Checker:
    """Walks settings beside the signatures of the classes that they describe.

    Attributes:
        renamed: New name of each key that `check` found under its old one and changed, by its dotted path.

    Args:
        top_level: Keys that are allowed at the top level.
        classes: Classes that are known without being named, by key: the default model and data module.
        implied: Classes that options without a class are meant for, by key, where the default is ``None``.
    """

    def __init__(
        self,
        top_level: Mapping[str, Argument],
        classes: Mapping[str, type],
        implied: Mapping[str, type] = types.MappingProxyType({}),
    ) -> None:
        self._top_level = dict(top_level)
        self._implied = dict(implied)
        self._classes = dict(classes)
        self._changes: dict[str, type] = {}
        self.renamed: dict[str, str] = {}

    def check(self, root: Setting) -> dict[str, type]:
        """Check one overlay, or the command line; those that apply earlier must be checked earlier.

        Args:
            root: Settings as the user wrote them; gets the new names of keys that were renamed.

        Returns:
            The classes that it puts in the place of others, by path.

        Raises:
            UsageError: If a key or a class does not exist.
        """
        self._changes, self.renamed = {}, {}
        self._check_keys(root, self._top_level, "the configuration", "")
        return self._changes

    def find(self, path: str) -> tuple[Argument, type | None]:
        """Return the argument that a dotted path means, and the class that stands there, if that is known.

        Args:
            path: For example ``model.optimizer``.

        Raises:
            UsageError: If there is no such key.
        """
        arguments, owner, above = self._top_level, "the configuration", ""
        keys = path.split(".")
        for position, key in enumerate(keys):
            if key not in arguments:
                raise UsageError(_unknown_key(key, Place(), owner, arguments, above))
            argument, above = arguments[key], ".".join(keys[: position + 1])
            cls = self._classes.get(above) or _default_class(argument) or _only_class(argument)
            arguments, owner = (cls and arguments_of(cls)) or {}, cls.__name__ if cls else above
        return argument, cls

    def named(self, name: str, path: str) -> type | None:
        """Return the class of a name for the argument at a dotted path, or None if that takes no classes.

        Args:
            name: Short name or import path.
            path: For example ``model.optimizer``.

        Raises:
            UsageError: If there is no such class or key.
        """
        return _named_class(Setting(name), self.find(path)[0].annotation, path)

    def _check_keys(self, setting: Setting, arguments: dict[str, Argument], owner: str, path: str) -> None:
        for written, child in setting.value.items():
            key = written.removesuffix("+")
            if key not in arguments:
                raise UsageError(_unknown_key(written, child.place, owner, arguments, path))
            below = f"{path}.{key}".lstrip(".")
            # What is appended is an item of a list: it takes the place of nothing.
            self._check_value(child, arguments[key], below if key == written else f"{below}{_APPENDED}")

    def _check_value(self, setting: Setting, argument: Argument, path: str) -> None:
        if isinstance(setting.value, list):
            for index, item in enumerate(setting.value):
                place = path if path.endswith(_APPENDED) else f"{path}[{index}]"
                self._classes.pop(place, None)
                _refuse_class_as_key(item, argument, place)
                self._check_value(item, Argument(argument.annotation), place)
        elif isinstance(setting.value, dict):
            self._check_mapping(setting, argument, path)
        elif path == "trainer" and setting.value is not None:
            raise UsageError(
                f"trainer takes settings, such as trainer: {{max_steps: 100}}, got {setting.value!r}.\n"
                f"  Written in {setting.place}."
            )
        elif isinstance(setting.value, str) and not accepts_text(argument.annotation):
            self._remember(path, _named_class(setting, argument.annotation, path), argument)

    def _check_mapping(self, setting: Setting, argument: Argument, path: str) -> None:
        content = setting.value
        if "class_path" in content:
            self._remember(path, _named_class(content["class_path"], argument.annotation, path), argument)
        elif path in self._implied and content and self._classes.get(path) is None:
            self._remember(path, self._implied[path], argument)
        cls = self._classes.get(path) or _default_class(argument)
        if cls is None:
            return
        arguments = arguments_of(cls)
        for mapping in (setting, content.get("init_args", Setting(None))):
            self._use_new_names(mapping, cls, arguments or {}, path)
        if arguments is not None:
            self._check_keys(_fields(setting, cls, path), arguments, cls.__name__, path)

    def _use_new_names(self, setting: Setting, cls: type, arguments: Mapping[str, Argument], path: str) -> None:
        for old, child in list(setting.value.items()) if isinstance(setting.value, dict) else ():
            new = None if old in arguments else new_argument(cls, old)
            if new is not None:
                setting.value[new] = setting.value.pop(old)
                self.renamed[_path_of([*path.split("."), old])] = new
                message = f"{old} of {cls.__name__} is now called {new}; version 0.3 removes the old name."
                warnings.warn(f"{message} Written in {child.place}.", stacklevel=2)

    def _remember(self, path: str, cls: type | None, argument: Argument) -> None:
        before = self._classes.get(path) or _default_class(argument)
        if cls is None or before is cls:
            return
        self._changes[path] = cls
        for below in [known for known in self._classes if known.startswith(f"{path}.")]:
            del self._classes[below]
        self._classes[path] = cls


def _refuse_class_as_key(item: Setting, argument: Argument, path: str) -> None:
    """Refuse ``- SampleText: {...}``, an item that has the name of its class as a key."""
    content = item.value
    if not isinstance(content, dict) or len(content) != 1:
        return
    name, options = next(iter(content.items()))
    if name not in _SPEC and name in subclasses_by_name(accepted_classes(argument.annotation)):
        raise UsageError(
            f"{path.removesuffix(_APPENDED)} has the name of a class as a key: {name}.\n"
            f"  Written in {options.place}. Write {{class_path: {name}, init_args: {{OPTION: VALUE}}}}."
        )


def _fields(setting: Setting, cls: type, path: str) -> Setting:
    """Return what is meant for the constructor: the content itself, or what stands under ``init_args``."""
    content: dict[str, Setting] = setting.value
    if content.keys().isdisjoint(_SPEC):
        return setting
    direct = {key: child for key, child in content.items() if key not in _SPEC}
    for key, child in direct.items():
        if child.place.path is not None:  # `--key Name --key.argument value` is right, the same in YAML is not
            raise UsageError(_stray_key(key, child.place, cls, path))
    arguments = content.get("init_args", Setting({})).value
    return Setting({**(arguments if isinstance(arguments, dict) else {}), **direct})


def _insert(root: dict[str, Setting], keys: list[str], leaf: Setting) -> None:
    *parents, last = keys
    for key in parents:
        appended = root[f"{key}+"].value if f"{key}+" in root else None
        if appended:  # `--callbacks+=Name --callbacks.option value` sets the option of the newest item
            below = appended[-1] = _as_mapping(appended[-1])
        else:
            below = root[key] = _as_mapping(root.get(key, Setting({})))
        root = below.value
    if last.endswith("+"):
        items = root.setdefault(last, Setting([])).value
        items += leaf.value if isinstance(leaf.value, list) else [leaf]
    else:
        root[last] = leaf


def _as_mapping(setting: Setting) -> Setting:
    """Return ``Name`` as a mapping that options can be added to: `--model Name --model.option value`."""
    return setting if isinstance(setting.value, dict) else Setting({"class_path": setting})


def _command_line_value(text: str) -> Setting:
    return placed(read_value(text) if text[:1] in ("[", "{") else text)


def _named_class(setting: Setting, annotation: Any, path: str) -> type | None:
    name, expected, path = setting.value, accepted_classes(annotation), path.removesuffix(_APPENDED)
    if not isinstance(name, str) or not expected:
        return None
    known = subclasses_by_name(expected)
    ours = sorted(
        key for key, cls in known.items() if cls.__module__.startswith("lightning_lm.") and cls not in expected
    )
    if ours and "/" in name and not name.endswith(SETTINGS_SUFFIXES):
        raise UsageError(_no_class(setting, expected, {key: known[key] for key in ours}, path))
    if "." in name:
        return _imported(setting, annotation, path)
    if name not in known and re.fullmatch(r"[A-Za-z_]\w*", name) and name.lower() not in _CONSTANTS:
        kinds = " or ".join(cls.__name__ for cls in expected)
        raise UsageError(
            f"Unknown class {name!r} for {path}.{_nearest(name, known)}\n"
            f"  Written in {setting.place}; needed is a {kinds}."
        )
    return known.get(name)


def _no_class(setting: Setting, expected: list[type], ours: Mapping[str, type], path: str) -> str:
    """Say what is needed in place of a path or a text, with an option that takes a path if a class has one."""
    lines = [
        f"{path} takes the name of a class, got {setting.value!r}.",
        f"  Written in {setting.place}. Expected a {' or '.join(cls.__name__ for cls in expected)}: {', '.join(ours)}.",
    ]
    for name in ours:
        taken = [key for key in ("checkpoint", "path", "train") if key in (arguments_of(ours[name]) or ())]
        if taken:
            lines.append(f"  For a file or folder: --{path} {name} --{path}.{taken[0]} {setting.value}")
            break
    return "\n".join(lines)


def _imported(setting: Setting, annotation: Any, path: str) -> type | None:
    module, _, name = setting.value.rpartition(".")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", setting.value) or module == "" or Path(setting.value).is_file():
        return None  # the path of a file with settings
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"The class {setting.value!r} for {path} cannot be imported: {error}.\n  Written in {setting.place}."
        ) from error
    if not isinstance(found, type):
        return None
    expected = accepted_classes(annotation)
    fits = any(getattr(base, "_is_protocol", False) or base in found.__mro__ for base in expected)
    if not fits and not accepts_text(annotation):  # a callable is not known by its class
        known = subclasses_by_name(expected)
        raise UsageError(
            f"{setting.value} is no {' or '.join(cls.__name__ for cls in expected)}, which {path} takes."
            f"{_nearest(found.__name__, known)}\n  Written in {setting.place}."
        )
    return found


def _default_class(argument: Argument) -> type | None:
    expected = accepted_classes(argument.annotation)
    cls = type(argument.default)
    return cls if any(base in cls.__mro__ for base in expected) else None


def _only_class(argument: Argument) -> type | None:
    known = subclasses_by_name(accepted_classes(argument.annotation))
    return next(iter(known.values())) if len(known) == 1 else None


def _unknown_key(key: str, place: Place, owner: str, arguments: dict[str, Argument], path: str) -> str:
    return (
        f"Unknown key {key!r} in {owner}.{_nearest(key, arguments)}\n"
        f"  Written in {place}, as {path + '.' if path else ''}{key}.\n"
        f"  {owner[0].upper()}{owner[1:]} takes: {', '.join(arguments)}."
    )


def _stray_key(key: str, place: Place, cls: type, path: str) -> str:
    near = _nearest(key, _SPEC)
    return (
        f"Key {key!r} stands beside class_path in {path}.{near}\n"
        f"  Written in {place}. Arguments of {cls.__name__} belong under init_args."
    )


def _nearest(word: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""

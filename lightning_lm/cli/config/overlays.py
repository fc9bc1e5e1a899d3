"""YAML files as ``--config`` takes them: recipe names, stacked overlays, and the line on which every key stands.

A file may name the overlays it builds on, which are then read first::

    base: [base/trainer, base/llama]
    trainer: {max_steps: 800}

A name is a file beside the one that names it, a path from the working directory, or a recipe of the package.
"""

import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_lm.cli.config import yaml_text
from lightning_lm.cli.config.class_paths import current_class_path
from lightning_lm.cli.config.yaml_text import SETTINGS_SUFFIXES
from lightning_lm.cli.recipes import find_recipe, recipe_names
from lightning_lm.errors import UsageError

__all__ = [
    "Overlay",
    "Place",
    "Setting",
    "check_command",
    "expand_configs",
    "in_fewer_configs",
    "placed",
    "plain",
    "read_overlays",
]

_BASE, _SWEEP = "base", "sweep"
_FLAGS = ("--config", "-c")
_GROUPS = ("--trainer", "--model", "--data")


@dataclass(frozen=True)
class Place:
    """Place of a setting: a line of a file, or the command line."""

    path: Path | None = None
    line: int = 0

    def __str__(self) -> str:
        return "the command line" if self.path is None else f"{self.path}, line {self.line}"


@dataclass(frozen=True)
class Setting:
    """One value as the user wrote it, with its place.

    Args:
        value: A scalar, a list of settings, or a dictionary of settings.
        place: Place of its key.
    """

    value: Any
    place: Place = field(default_factory=Place)


@dataclass(frozen=True)
class Overlay:
    """One YAML file without its ``base`` key.

    Args:
        path: The file.
        root: Its content, with places.
        sweep: Content of the ``sweep`` block, for the verb of that name; the other verbs ignore it.
    """

    path: Path
    root: Setting
    sweep: Any = None

    def to_yaml(self) -> str:
        """Return the content as YAML text without comments."""
        return yaml.safe_dump(plain(self.root), sort_keys=False, allow_unicode=True) if self.root.value else "{}\n"


_COMMANDS = {
    "stages": "road --config",
    "steps": "curate --config",
    "trainer": "fit --config",
    "tasks": "evaluate --checkpoint PATH --tasks",
}
"""Commands by a key that only their files have."""


def check_command(overlays: Iterable[Overlay], own: str) -> None:
    """Refuse a file that is for another command.

    Args:
        overlays: Files of a command line.
        own: Key of `_COMMANDS` that files for this command have.

    Raises:
        UsageError: If a file has the key of another command, and not this one's.
    """
    for overlay in overlays:
        keys = overlay.root.value
        other = next((command for key, command in _COMMANDS.items() if key in keys and key != own), None)
        if other is not None and own not in keys:
            raise UsageError(f"{overlay.path} is for another command: lightning-lm {other} {overlay.path}")


def expand_configs(words: Sequence[str]) -> tuple[list[str], list[Overlay]]:
    """Replace every ``--config NAME`` by the YAML text of the overlays that it stands for.

    ``--trainer FILE``, ``--model FILE`` and ``--data FILE`` are overlays of that one key, as LightningCLI has them.

    Args:
        words: The command line after the verb.

    Returns:
        The new command line, and the overlays in the order in which they apply.

    Raises:
        UsageError: If a file is missing or unreadable, or overlays name each other in a circle.
    """
    yaml_text.check_words(words)
    expanded: list[str] = []
    overlays: list[Overlay] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag not in (*_FLAGS, *_GROUPS):
            expanded.append(word)
            continue
        if not equals:
            value = next(rest, "")
        if flag == "--trainer" and not value.startswith("{") and not value.endswith(SETTINGS_SUFFIXES):
            raise UsageError(_no_settings_file(value))
        if flag in _GROUPS and not value.endswith(SETTINGS_SUFFIXES):  # the name of a class
            expanded += [f"{flag}={value}"]
            continue
        layers = read_overlays(value) if flag in _FLAGS else [_group_overlay(flag.removeprefix("--"), Path(value))]
        overlays += layers
        expanded += [f"--config={layer.to_yaml()}" for layer in layers]
    return expanded, overlays


def in_fewer_configs(words: Sequence[str]) -> list[str]:
    """Join the texts of configs that follow each other and share no top-level key: the parser reads each in 0.1 s.

    Args:
        words: A command line as of `expand_configs`.
    """
    joined: list[str] = []
    keys: list[set[str]] = []  # of the configs at the end of what is joined
    for word in words:
        if not word.startswith("--config="):
            keys = []
            joined.append(word)
            continue
        text = word.removeprefix("--config=")
        own = set(re.findall(r"^(\w+)\+?:", text, re.MULTILINE))
        place = next((place for place in range(len(keys), 0, -1) if keys[place - 1] & own or not keys[place - 1]), 0)
        if place < len(keys) and own:
            joined[place - len(keys)] += f"\n{text}"
            keys[place] |= own
        else:
            keys.append(own)
            joined.append(word)
    return joined


def read_overlays(name: str, *, beside: Path | None = None, opened: tuple[Path, ...] = ()) -> list[Overlay]:
    """Read a YAML file and, before it, the overlays that it names as its base.

    Args:
        name: A path or the name of a recipe.
        beside: The folder of the file in which the name was written.
        opened: Files that are being read, to find circles.
    """
    path = _find(name, beside)
    if path in opened:
        chain = " -> ".join(str(file) for file in (*opened, path))
        raise UsageError(f"These overlays name each other as their base: {chain}.")
    root = _read(path)
    base = root.value.pop(_BASE, Setting([]))
    sweep = plain(root.value.pop(_SWEEP, Setting(None)))
    names = [base.value] if isinstance(base.value, str) else plain(base)
    if not isinstance(names, list) or not all(isinstance(below, str) for below in names):
        raise UsageError(
            f"`base:` in {base.place} must be a name or a list of names, such as [base/trainer, base/llama]."
        )
    layers: list[Overlay] = []
    for below in names:
        layers += read_overlays(below, beside=path.parent, opened=(*opened, path))
    return [*layers, Overlay(path, root, sweep)]


def _group_overlay(key: str, path: Path) -> Overlay:
    """Read the settings of one top-level key; a file that repeats the key is understood too."""
    if not path.is_file():
        raise UsageError(f"--{key} {str(path)!r}: there is no such file (looked from {Path.cwd()}).")
    root = _read(path)
    return Overlay(path, root if set(root.value) == {key} else Setting({key: root}, root.place))


def _no_settings_file(value: str) -> str:
    key, _, setting = value.partition("=")
    return f"--trainer takes a YAML file, got {value!r}. For one setting write --trainer.{key} {setting or 'VALUE'}."


def _find(name: str, beside: Path | None) -> Path:
    candidates = [Path(name)] if beside is None else [beside / name, beside / f"{name}.yaml", Path(name)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    recipe = find_recipe(name) if name else None
    if recipe is None:
        raise UsageError(
            f"--config {name!r} is neither a file nor a recipe. The recipes are: {', '.join(recipe_names())}."
        )
    return recipe


def _read(path: Path) -> Setting:
    try:
        root = _setting(yaml_text.compose(yaml_text.settings_text(path), str(path)), path, 1)
    except yaml.MarkedYAMLError as error:
        raise UsageError(_not_yaml(path, error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if root.value is None:
        return Setting({}, root.place)
    if not isinstance(root.value, dict):
        raise UsageError(f"{path} must hold keys and values, such as `trainer:`, at its top level.")
    return root


def _not_yaml(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark, problem = error.problem_mark, str(error.problem)
    place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
    remedy = "Indent with spaces, not tabs." if "\\t" in problem else "Check the indentation and the line above."
    return f"{path} is not YAML: {problem}.\n  Written in {place}. {remedy}"


def _refuse_repeated(node: yaml.MappingNode, path: Path) -> None:
    """YAML readers keep the last of two equal keys without a word."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(
                f"A key in line {line} of {path} is a list or has keys itself. Write a name before the colon."
            )
        if key.value != "<<" and str(key.value) in lines:
            raise UsageError(
                f"Key {key.value!r} stands twice, in lines {lines[str(key.value)]} and {line} of {path}.\n"
                "  Put what stands under both together, or remove one."
            )
        lines[str(key.value)] = line


def _setting(node: yaml.Node | None, path: Path, line: int) -> Setting:
    place = Place(path, line)
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated(node, path)
        loader = yaml.SafeLoader("")
        loader.flatten_mapping(node)  # YAML's merge keys: `<<: *defaults`
        settings = {str(k.value): _setting(v, path, k.start_mark.line + 1) for k, v in node.value}
        named = settings.get("class_path")
        if named is not None and isinstance(named.value, str):
            settings["class_path"] = Setting(current_class_path(named.value), named.place)
        return Setting(settings, place)
    if isinstance(node, yaml.SequenceNode):
        return Setting([_setting(item, path, item.start_mark.line + 1) for item in node.value], place)
    return Setting(None if node is None else _scalar(node, path), place)


def _scalar(node: yaml.Node, path: Path) -> Any:
    try:
        value = yaml.SafeLoader("").construct_object(node)
        str(value)  # integers have a limit of digits in decimal
    except (ValueError, KeyError, AttributeError, OverflowError):  # of dates, booleans and numbers that are none
        raise yaml_text.no_value(node, str(path)) from None
    if isinstance(value, str):
        yaml_text.check_text(value, f"the text in line {node.start_mark.line + 1} of {path}", (path,))
    return value


def placed(value: Any) -> Setting:
    """Return a value of the command line as settings.

    Args:
        value: A scalar, a list or a mapping.
    """
    if isinstance(value, dict):
        return Setting({str(key): placed(item) for key, item in value.items()})
    return Setting([placed(item) for item in value] if isinstance(value, list) else value)


def plain(setting: Setting) -> Any:
    """Return settings without their places.

    Args:
        setting: A scalar, a list or a mapping.
    """
    if isinstance(setting.value, dict):
        return {key: plain(item) for key, item in setting.value.items()}
    if isinstance(setting.value, list):
        return [_function_path(item) or plain(item) for item in setting.value]
    return setting.value


def _function_path(setting: Setting) -> str | None:
    """Return ``module.function`` of a list item ``{class_path: module.function}``, which names no class."""
    path = setting.value.get("class_path") if isinstance(setting.value, dict) and len(setting.value) == 1 else None
    name = None if path is None else path.value
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name):
        return None
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return None  # the check says so, with its place
    return name if inspect.isfunction(found) else None

"""YAML that users hand in, as files and as values of the command line, with bounds of size, nesting and repetition.

In ten lines aliases can repeat each other into more settings than memory has room for, and PyYAML raises Python's own
errors for deep nesting and for scalars that are no values. jsonargparse, the parser of the command line, reads texts
inside of settings as YAML once more, and files that they name: these have the same bounds.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from lightning_lm.errors import UsageError

__all__ = ["SETTINGS_SUFFIXES", "check_text", "check_words", "compose", "no_value", "read_value", "settings_text"]

SETTINGS_SUFFIXES = (".yaml", ".yml", ".json")
"""File endings of settings files."""
_MAX_DEPTH = 100
_MAX_REPEATED = 10_000
"""Settings that aliases may add to those that are spelled out; ten lists of ten make ten billion."""
_MAX_BYTES = 2**22
"""The most bytes of a settings file, far more than anyone writes: these take some ten seconds to read."""
_MAX_JSON_BYTES = 2**16
"""A larger JSON file that a value names is data."""
_MARKS = frozenset("[{&*!")
"""One of these is in every text that is more than a scalar or a plain block, and before every tag."""
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_NOT_CONSTRUCTED = (ValueError, KeyError, AttributeError, OverflowError)
"""Errors of PyYAML for dates, booleans and numbers that are none."""


class _ValueLoader(yaml.SafeLoader):
    """Reads dates as text, as jsonargparse does."""


_ValueLoader.yaml_implicit_resolvers = {
    letter: [resolver for resolver in resolvers if resolver[0] != _TIMESTAMP]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def settings_text(path: Path) -> str:
    """Return the text of a settings file.

    Args:
        path: A YAML file.

    Raises:
        UsageError: If it is too large to be one.
    """
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise UsageError(
            f"{path} has {size:,} bytes, and settings are read up to {_MAX_BYTES:,}. Give data to a setting that takes "
            "it, such as --data.train."
        )
    return path.read_text(encoding="utf-8")


def compose(text: str, name: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> yaml.Node | None:
    """Return the root node of a YAML text.

    Args:
        text: YAML.
        name: Name of the text for messages: a path, or an option of the command line.
        loader: Class that resolves tags.

    Raises:
        UsageError: If it is nested too deeply, contains itself, or its aliases stand for very many settings.
        yaml.YAMLError: If it is not YAML.
    """
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=loader)
        _refuse_endless(root, name)
    except RecursionError:
        raise UsageError(
            f"What stands in {name} is nested too deeply to be settings. Take out the brackets that nothing needs."
        ) from None
    return root


def no_value(node: yaml.Node, name: str) -> UsageError:
    """Return the error for a scalar that cannot be constructed, such as the date 2026-13-45.

    Args:
        node: The scalar.
        name: Name of the text.
    """
    shown, line = str(node.value)[:40], node.start_mark.line + 1
    return UsageError(f"{shown!r} in line {line} of {name} is no value. Put it between quotes if it is text.")


def read_value(text: str, name: str = "the command line") -> Any:
    """Return the value that a text of the command line has as YAML; what is no YAML is text.

    Args:
        text: The value.
        name: Its option.

    Raises:
        UsageError: If it is endless in one of the ways that `compose` refuses, or has a scalar that is no value.
    """
    try:
        root = compose(text, name, _ValueLoader)
        if root is None:
            return None
        _require_values(root, name)
        return _ValueLoader("").construct_document(root)
    except yaml.YAMLError:
        return text


def check_words(words: Iterable[str]) -> None:
    """Refuse values of a command line that jsonargparse would not get to the end of.

    Args:
        words: The command line behind the verb.

    Raises:
        UsageError: As of `read_value`.
    """
    option = "the command line"
    for word in words:
        if word.startswith("--"):
            option, _, word = word.partition("=")
        check_text(word, option)


def check_text(text: str, name: str, opened: tuple[Path, ...] = ()) -> None:
    """Refuse a text that is endless as YAML, or that names a settings file that is.

    Args:
        text: A value of the command line, or a text in settings.
        name: Place of the text.
        opened: Settings files that are being read.

    Raises:
        UsageError: As of `read_value`.
    """
    if text.endswith(SETTINGS_SUFFIXES):
        path = Path(text)
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # jsonargparse says so
            if path not in opened and path.is_file() and not _is_data(path):
                _check_texts(compose(settings_text(path), text, _ValueLoader), text, (*opened, path))
    elif text.isdigit() or not _MARKS.isdisjoint(text):
        with contextlib.suppress(yaml.YAMLError):
            root = compose(text, name, _ValueLoader)
            if root is not None:
                _require_values(root, name)
                _check_texts(root, name, opened)


def _is_data(path: Path) -> bool:
    return path.suffix == ".json" and path.stat().st_size > _MAX_JSON_BYTES


def _check_texts(root: yaml.Node | None, name: str, opened: tuple[Path, ...]) -> None:
    for node in _scalars(root):
        if node.style is not None or node.value.endswith(SETTINGS_SUFFIXES):  # plain ones are no further YAML
            check_text(node.value, name, opened)


def _require_values(root: yaml.Node, name: str) -> None:
    for node in _scalars(root):
        try:
            str(_ValueLoader("").construct_object(node))  # integers have a limit of digits in decimal
        except _NOT_CONSTRUCTED:
            raise no_value(node, name) from None


def _scalars(root: yaml.Node | None) -> list[yaml.ScalarNode]:
    found, waiting, seen = [], [root], set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.ScalarNode):
            found.append(node)
        elif node is not None and id(node) not in seen:
            seen.add(id(node))
            waiting += _below(node)
    return found


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [item for pair in node.value for item in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refuse_endless(root: yaml.Node | None, name: str) -> None:
    sizes: dict[yaml.Node, int] = {}

    def size(node: yaml.Node, depth: int = 0) -> int:
        """Return the number of settings that a node stands for, its aliases written out."""
        if depth > _MAX_DEPTH:
            raise RecursionError
        if sizes.get(node) == 0:
            line = node.start_mark.line + 1
            raise UsageError(f"What begins in line {line} of {name} contains itself by an alias. Take the alias out.")
        if node not in sizes:
            sizes[node] = 0
            sizes[node] = 1 + sum(size(item, depth + 1) for item in _below(node))
        return sizes[node]

    repeated = 0 if root is None else size(root) - len(sizes)
    if repeated > _MAX_REPEATED:
        raise UsageError(
            f"The aliases of {name} stand for {repeated:,} settings beside those written there; at most "
            f"{_MAX_REPEATED:,} are read. Replace aliases of aliases by what they are to say."
        )

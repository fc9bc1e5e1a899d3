"""The recipes that come with the package: where they are, and the verb that lists, shows and copies them."""

import argparse
import shutil
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

from lightning_lm.errors import ConfigurationError
from lightning_lm.storage import replacing

__all__ = ["TASK_LISTS", "add_arguments", "find_recipe", "recipe_names", "recipes_folder", "road_names", "run"]

TASK_LISTS = "evaluate/"
"""Folder of the lists of tasks, for ``evaluate --tasks``."""

_SUFFIX, _ROADS, _NAME_WIDTH = ".yaml", "road/", 30


def recipes_folder() -> Path:
    """Return the folder that holds the recipes: inside the installed package, or at the root of a checkout."""
    spec = find_spec("lightning_lm.recipes")
    assert spec is not None, "the recipes are missing from this installation"
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def recipe_names() -> list[str]:
    """Return the names that ``fit --config`` accepts, as ``pretrain/quickstart``: no bases, roads, lists of tasks."""
    return [name for name in _names() if not name.startswith(("base/", _ROADS, TASK_LISTS))]


def road_names() -> list[str]:
    """Return the names that ``road --config`` accepts."""
    return [name for name in _names() if name.startswith(_ROADS)]


def _all_names() -> list[str]:
    return [name for name in _names() if not name.startswith("base/")]


def _names() -> list[str]:
    folder = recipes_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{_SUFFIX}"))


def find_recipe(name: str) -> Path | None:
    """Return the file of a recipe, given as ``pretrain/quickstart`` or ``recipes/pretrain/quickstart.yaml``.

    Args:
        name: A name of `recipe_names`, with or without the folder's name in front and the suffix after it; its last
            part alone if only one recipe ends in it.
    """
    folder = recipes_folder()
    relative = Path(name.removeprefix("recipes/"))
    if not relative.name or relative.is_absolute() or ".." in relative.parts:
        return None
    path = folder / relative.with_suffix(_SUFFIX)
    if path.is_file():
        return path
    named = [other for other in recipe_names() if other.rpartition("/")[2] == relative.with_suffix("").as_posix()]
    return folder / f"{named[0]}{_SUFFIX}" if len(named) == 1 else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``lightning-lm recipes`` takes.

    Args:
        parser: The parser of the verb.
    """
    actions = parser.add_subparsers(dest="action", metavar="{list,show,copy}")
    actions.add_parser("list", help="print the names (the default)")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name", help="for example pretrain/quickstart")
    copy = actions.add_parser("copy", help="copy a recipe to a file of your own, to change it")
    copy.add_argument("name", help="for example pretrain/quickstart")
    copy.add_argument("target", nargs="?", type=Path, help="file or folder; the recipe's own file name when left out")


def run(arguments: argparse.Namespace) -> int:
    """List, show or copy recipes.

    Args:
        arguments: Parsed arguments of `add_arguments`.

    Returns:
        The exit status.

    Raises:
        ConfigurationError: If no recipe has that name, or the target exists.
    """
    if arguments.action == "show":
        print(_existing(arguments.name).read_text(encoding="utf-8"), end="")
    elif arguments.action == "copy":
        print(f"Wrote {_copy(_existing(arguments.name), arguments.target)}")
    else:
        for name in _all_names():
            print(_fitted(f"{name:<{_NAME_WIDTH}} {_title(name)}"))
    return 0


def _fitted(line: str) -> str:
    """Return a line of the list, broken at blanks where a terminal would break it in a word."""
    if not sys.stdout.isatty():
        return line  # one line a recipe, for grep
    width, indent = shutil.get_terminal_size().columns, " " * (_NAME_WIDTH + 1)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _title(name: str) -> str:
    first = _existing(name).read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _existing(name: str) -> Path:
    path = find_recipe(name)
    if path is None:
        raise ConfigurationError(f"No recipe is called {name!r}. There are: {', '.join(_all_names())}.")
    return path


def _copy(source: Path, target: Path | None) -> Path:
    target = Path(source.name) if target is None else target
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise ConfigurationError(f"{target} exists already; give another name or remove it first.")
    with replacing(target) as file:
        file.write(source.read_bytes())
    return target

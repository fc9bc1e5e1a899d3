"""Options of one item of a list by the name of its class, so that an overlay need not repeat the list.

``--trainer.callbacks.SampleText.every_n_steps 500``, or in YAML::

    trainer: {callbacks: {SampleText: {every_n_steps: 500}}}

Every list that an earlier overlay wrote can be changed so. The list is written out again, with the item changed, in the
place where the option stood; what stays as it was keeps the line on which it was written.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import yaml

from lightning_lm.cli.config.overlays import Overlay, Setting, placed, plain
from lightning_lm.cli.config.yaml_text import read_value
from lightning_lm.errors import UsageError

__all__ = ["change_items"]

_SPEC = ("class_path", "init_args", "dict_kwargs")
_CONFIG = "--config"


def change_items(words: Sequence[str], overlays: Sequence[Overlay]) -> tuple[list[str], list[Overlay]]:
    """Replace every option of an item by the whole list with that item changed.

    Args:
        words: The command line after the verb, with the text of an overlay in each ``--config``.
        overlays: The overlays, in the order of those words.

    Raises:
        UsageError: If a list has no such item, or several.
    """
    lists: dict[str, list[Setting]] = {"trainer.callbacks": []}
    waiting, changed, result = list(overlays), [], []
    for name, value in _options(words):
        if name == _CONFIG:
            overlay = waiting.pop(0)
            changed.append(replace(overlay, root=_changed(overlay.root, "", lists)))
            result.append(f"{_CONFIG}={changed[-1].to_yaml()}")
            continue
        path = _follow(name, value, lists)
        if path is not None:
            value = yaml.safe_dump(plain(Setting(lists[path])), default_flow_style=True, width=math.inf).strip()
            name = f"--{path}"
        result.append(name if value is None else f"{name}={value}")
    return result, changed


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each option with its value, whether they are one word or two."""
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not equals and name.startswith("--") and rest and not rest[0].startswith("--"):
            yield name, rest.pop(0)
        else:
            yield name, value if equals else None


def _changed(setting: Setting, path: str, lists: dict[str, list[Setting]]) -> Setting:
    """Return the settings of one overlay with whole lists; remember the lists."""
    if not isinstance(setting.value, dict):
        if isinstance(setting.value, list):
            lists[path] = setting.value
        else:
            lists.pop(path, None)
        return setting
    if path in lists and setting.value.keys().isdisjoint(_SPEC):
        for name, options in setting.value.items():
            lists[path] = _with_options(lists[path], name, options, path)
        return replace(setting, value=lists[path])
    lists.pop(path, None)
    content = {}
    for key, child in setting.value.items():
        below = path if key == "init_args" else f"{path}.{key}".lstrip(".")
        if key.endswith("+"):
            items = child.value if isinstance(child.value, list) else [child]
            lists[below[:-1]] = [*lists.get(below[:-1], []), *items]
            content[key] = child
        else:
            content[key] = _changed(child, below, lists)
    return replace(setting, value=content)


def _follow(option: str, value: str | None, lists: dict[str, list[Setting]]) -> str | None:
    """Bring the lists up to date with an option; return the path of a list of which it means one item by its class."""
    name, written = option.removeprefix("--"), placed(read_value(value or ""))
    if name.endswith("+"):
        items = written.value if isinstance(written.value, list) else [written]
        lists[name[:-1]] = [*lists.get(name[:-1], []), *items]
    elif isinstance(written.value, list):
        lists[name] = written.value
    else:
        lists.pop(name, None)
        for path in [path for path in lists if name.startswith(f"{path}.")]:
            item, *keys = name.removeprefix(f"{path}.").split(".")
            by_class = item[:1].isupper() or item in map(_name, lists[path])
            for key in reversed(keys if by_class else [item, *keys]):
                written = Setting({key: written})
            if by_class:
                lists[path] = _with_options(lists[path], item, written, path)
                return path
            if lists[path]:  # in lower case it is an option of the last item
                lists[path] = [*lists[path][:-1], _with_arguments(lists[path][-1], written)]
    return None


def _name(item: Setting) -> str:
    """Return the short name of an item's class."""
    path = item.value.get("class_path") if isinstance(item.value, dict) else item
    return str(path.value if path is not None else "").rpartition(".")[2]


def _with_options(items: list[Setting], name: str, options: Setting, path: str) -> list[Setting]:
    found = [index for index, item in enumerate(items) if _name(item) == name]
    if len(found) != 1:
        raise UsageError(_no_item(list(map(_name, items)), name, options, path))
    if not isinstance(options.value, dict):
        raise UsageError(
            f"{path}.{name} takes options of {name}, got {options.value!r}.\n"
            f"  Written in {options.place}. Write {path}.{name}.OPTION."
        )
    index = found[0]
    return [*items[:index], _with_arguments(items[index], options), *items[index + 1 :]]


def _no_item(names: Sequence[str], name: str, options: Setting, path: str) -> str:
    lines = [f"{path} has no {name}. Its items are: {', '.join(names) or 'none'}.", f"  Written in {options.place}."]
    near = difflib.get_close_matches(name, names, n=1)
    if name in names:
        lines[0] = f"{path} has {names.count(name)} items of class {name}, so a name does not say which."
        lines[1] += f" Write the whole list: {path}: [...]"
    elif near:
        lines[1] += f" Did you mean {near[0]}?"
    else:
        lines[1] += f" To add one: --{path}+={name}"
    return "\n".join(lines)


def _with_arguments(item: Setting, options: Setting) -> Setting:
    spec = item.value if isinstance(item.value, dict) else {"class_path": item}
    return replace(item, value={**spec, "init_args": _merged(spec.get("init_args", Setting({})), options)})


def _merged(old: Setting, new: Setting) -> Setting:
    if not isinstance(new.value, dict) or "class_path" in new.value:
        return new
    if isinstance(old.value, str):
        return replace(old, value={"class_path": old, "init_args": new})
    if not isinstance(old.value, dict):
        return new
    if "class_path" in old.value and new.value.keys().isdisjoint(_SPEC):
        return replace(old, value={**old.value, "init_args": _merged(old.value.get("init_args", Setting({})), new)})
    both = {key: _merged(old.value[key], child) if key in old.value else child for key, child in new.value.items()}
    return replace(old, value={**old.value, **both})

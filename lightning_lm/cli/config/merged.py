"""Settings of verbs that are not LightningCLI's: overlays and options of the command line as one dictionary."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lightning_lm.cli.config.list_items import change_items
from lightning_lm.cli.config.overlays import check_command, expand_configs
from lightning_lm.cli.config.yaml_text import read_value
from lightning_lm.errors import UsageError

__all__ = ["merged_settings"]


def merged_settings(words: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a command line: ``--config NAME`` and ``--key.key VALUE``, the later ones win.

    Args:
        words: The command line after the verb.
        keys: Keys of the top level.

    Raises:
        UsageError: If a word is no option, or a key is unknown.
    """
    expanded, overlays = expand_configs(words)
    check_command(overlays, "steps")
    for overlay in overlays:
        for key, setting in overlay.root.value.items():
            _check(key.removesuffix("+"), keys, f"\n  Written in {setting.place}.")
    changed, _ = change_items(expanded, overlays)
    settings: dict[str, Any] = {}
    rest = list(changed)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise UsageError(f"{name!r} is no option. Settings are written as --key value.")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else ""
        name = name.removeprefix("--")
        if name == "config":
            settings = _merged(settings, yaml.safe_load(value) or {})
            continue
        _check(name.split(".")[0].removesuffix("+"), keys, "\n  Written in the command line.")
        found: Any = read_value(value)
        for key in reversed(name.split(".")):
            found = {key: found}
        settings = _merged(settings, found)
    return settings


def _check(key: str, keys: Sequence[str], place: str) -> None:
    if key not in keys:
        near = difflib.get_close_matches(key, keys, n=1)
        advice = f" Did you mean {near[0]!r}?" if near else f" The keys are: {', '.join(keys)}."
        raise UsageError(f"There is no setting {key!r}.{advice}{place}")


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(old)
    for key, value in new.items():
        if key.endswith("+"):
            items = value if isinstance(value, list) else [value]
            result[key[:-1]] = [*(result.get(key[:-1]) or []), *items]
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and "class_path" not in value:
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result

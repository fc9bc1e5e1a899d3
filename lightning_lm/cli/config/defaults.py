"""Gives a part that replaces another its own defaults.

Where an overlay puts ``AdamW`` in the place of ``Muon``, jsonargparse carries over every argument that both have: AdamW
would train at Muon's learning rate. So the new part's defaults are written out before the overlay is read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from lightning_lm.cli.config.class_paths import class_path
from lightning_lm.parts import Part

__all__ = ["defaults_of_changes"]


def defaults_of_changes(changes: Mapping[str, type]) -> str | None:
    """Return YAML that names each changed class, with the defaults of those that are parts; None if there is nothing.

    Args:
        changes: The new class by the dotted path of its key; items of lists are no concern, they are replaced whole.
    """
    root: dict[str, Any] = {}
    for path in sorted(path for path in changes if "[" not in path):
        *parents, last = path.split(".")
        below = root
        for key in parents:
            entry = below.setdefault(key, {})
            below = entry["init_args"] if "class_path" in entry else entry
        below[last] = _described(changes[path])
    return yaml.safe_dump(root, sort_keys=False) if any(issubclass(cls, Part) for cls in changes.values()) else None


def _described(cls: type) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if issubclass(cls, Part):
        for field in dataclasses.fields(cls):
            if field.default is not dataclasses.MISSING:
                arguments[field.name] = _plain(field.default)
    return {"class_path": class_path(cls), "init_args": arguments}


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class_path": class_path(type(value)), "init_args": fields}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value

"""Defaults that follow from other settings: of a part that replaces another, and the precision of a device.

Where an overlay puts ``AdamW`` in the place of ``Muon``, jsonargparse carries over every argument that both have: AdamW
would train at Muon's learning rate. So the new part's defaults are written out before the overlay is read.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import yaml

from lightning_lm.cli.config.class_paths import class_path
from lightning_lm.parts import Part

__all__ = ["defaults_of_changes", "fast_precision"]


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


def fast_precision(accelerator: str) -> str:
    """Return ``bf16-mixed`` where that is much faster and as stable as float32, else ``32-true``.

    Weights, their updates and the loss stay in float32 either way.

    Args:
        accelerator: The Trainer's argument: ``auto``, ``cpu``, ``gpu``, ...
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "32-true"
    # A step takes half the time of a float32 one with the tiles of AMX, and 0.7 of it with the products of AVX-512.
    read: Callable[[], dict[str, bool]] = getattr(torch.cpu, "get_capabilities", dict)  # not in every supported torch
    capabilities = read()
    return "bf16-mixed" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "32-true"

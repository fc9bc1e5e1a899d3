"""Class paths in configurations: written as the package exports a class, and read wherever a class once was.

A run's ``config.yaml`` outlives the layout of the package: ``lightning_lm.optim.parts.AdamW`` names a file that may
move, ``lightning_lm.optim.AdamW`` does not.
"""

import importlib
import sys
from collections.abc import Iterator

__all__ = ["class_path", "current_class_path"]

_PACKAGE = "lightning_lm."


def class_path(cls: type) -> str:
    """Return the shortest import path of a class: that of the package which exports it.

    Args:
        cls: A class of a module that is imported.
    """
    for package in _packages_of(cls.__module__):
        if getattr(sys.modules.get(package), cls.__qualname__, None) is cls:
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def current_class_path(path: str) -> str:
    """Return the path by which a class of this package can be imported now; any other path as it is.

    Args:
        path: Class path, such as ``lightning_lm.models.norms.RMSNorm``, which an earlier version may have written.
    """
    module, _, name = path.rpartition(".")
    if not module.startswith(_PACKAGE) or module.count(".") < 2:
        return path
    for package in list(_packages_of(module))[1:]:
        try:
            if hasattr(importlib.import_module(package), name):
                return f"{package}.{name}"
        except ModuleNotFoundError:
            break
    return path


def _packages_of(module: str) -> Iterator[str]:
    """Yield a module with the packages above it, the outermost first."""
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])

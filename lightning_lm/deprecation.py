"""Deprecated names: an earlier version's exports, which work for one more minor version and warn."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["renamed_exports"]


def renamed_exports(module: str, names: Mapping[str, str], *, until: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module or package whose exports were renamed.

    Args:
        module: Name of the module, ``__name__``.
        names: New name of each old one. A new name with dots is that of another module's export.
        until: Version that removes the old names.

    Example:
        >>> import lightning_lm.deprecation
        >>> get = renamed_exports("lightning_lm.deprecation", {"old": "renamed_exports"}, until="9.0")
        >>> get("old") is renamed_exports
        True
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        package, _, new = names[name].rpartition(".")
        message = f"{module}.{name} is now {package or module}.{new}; version {until} removes the old name."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(package or module), new)

    return get

"""Deprecated names: an earlier version's exports and arguments, which work for one more minor version and warn."""

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["RENAMED_ARGUMENTS", "new_argument", "renamed_exports", "takes_renamed_arguments"]

T = TypeVar("T", bound=type)

RENAMED_ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "Completions": {"answers": "completions"},
    "DataParallelStrategy": {"exchange": "communication"},
    "GradientAverager": {"exchange": "communication"},
    "SupervisedRows": {"learn_on": "train_on"},
}
"""New name of each old argument, by class. Version 0.3 removes the old ones.

YAML files (also the ``config.yaml`` of a run), the command line and checkpoints are read with both; constructors take
both where `takes_renamed_arguments` stands above the class.
"""


def new_argument(cls: type, name: str) -> str | None:
    """Return the new name of an argument of a class, or None if the argument was not renamed.

    Args:
        cls: Class, or a subclass, of this package.
        name: Old name.
    """
    ours = (base for base in cls.__mro__ if base.__module__.startswith("lightning_lm."))
    return next((new for base in ours if (new := RENAMED_ARGUMENTS.get(base.__name__, {}).get(name))), None)


def takes_renamed_arguments(cls: T) -> T:
    """Let the constructor of a class take the old names of its arguments, and its instances have them; both warn.

    Args:
        cls: A class that `RENAMED_ARGUMENTS` lists.
    """
    construct = cls.__init__  # type: ignore[misc]
    names = RENAMED_ARGUMENTS[cls.__name__]

    @functools.wraps(construct)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        for old in names.keys() & kwargs.keys():
            new = names[old]
            if new in kwargs:
                raise TypeError(f"{old} is the old name of {new}; give {cls.__name__} {new} alone.")
            warnings.warn(_renamed(cls, old, new), DeprecationWarning, stacklevel=2)
            kwargs[new] = kwargs.pop(old)
        construct(self, *args, **kwargs)

    cls.__init__ = constructor  # type: ignore[misc]
    for old, new in names.items():
        setattr(cls, old, property(functools.partial(_read_old, old=old, new=new)))
    return cls


def _read_old(instance: Any, *, old: str, new: str) -> Any:
    warnings.warn(_renamed(type(instance), old, new), DeprecationWarning, stacklevel=2)
    return getattr(instance, new)


def _renamed(cls: type, old: str, new: str) -> str:
    return f"{old} of {cls.__name__} is now called {new}; version 0.3 removes the old name."


def renamed_exports(module: str, names: Mapping[str, str], *, until: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module or package whose exports were renamed.

    Args:
        module: Name of the module, ``__name__``.
        names: New name of each old one. A new name with dots is that of another module's export.
        until: Version that removes the old names.

    Example:
        >>> import lightning_lm.deprecation
        >>> get = renamed_exports("lightning_lm.deprecation", {"old": "renamed_exports"}, until="9.0")
        >>> with warnings.catch_warnings(action="ignore"):
        ...     get("old") is renamed_exports
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

"""Digests of steps: equal for equal settings, code of the user's functions and files that steps read."""

import dataclasses
import hashlib
import os
import types
from collections.abc import Mapping
from typing import Any

from lightning_lm.parts import Part

__all__ = ["fingerprint_of"]

_VERSION = 2
"""Counted up when the same steps give other documents, so that results of an older version are not reused."""


def fingerprint_of(value: Any) -> str:
    """Return a text that is equal for equal values, such as steps and their settings.

    Args:
        value: A part, a function, an object with settings in its ``__dict__``, a container of these, or plain data.
    """
    return f"{_VERSION}:{_described(value)}"


def _described(value: Any) -> str:
    if isinstance(value, Part) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{_name(type(value))}{_described(fields)}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key!r}:{_described(item)}" for key, item in sorted(value.items(), key=str)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_described, value)) + "]"
    if isinstance(value, str | os.PathLike):
        return repr(value) + _state(os.fspath(value))
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{_name(value)}({_code(value.__code__)},{_described(cells)},{_described(value.__defaults__ or ())})"
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return f"{_name(type(value))}{_described(vars(value))}{_code_of_call(value)}"
    return repr(value)


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _code_of_call(value: Any) -> str:
    call = vars(type(value)).get("__call__")
    return _code(call.__code__) if isinstance(call, types.FunctionType) else ""


def _code(code: types.CodeType) -> str:
    """Return a digest of a function's code; the addresses that constants show do not enter."""
    constants = [_code(item) if isinstance(item, types.CodeType) else repr(item) for item in code.co_consts]
    content = repr((code.co_code.hex(), code.co_names, constants))
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _state(path: str) -> str:
    """Return size and time of change of a file that a setting names."""
    if not path or len(path) > 4096 or "\n" in path or "\0" in path or not os.path.isfile(path):
        return ""
    status = os.stat(path)
    return f"@{status.st_size}:{status.st_mtime_ns}"

"""Parts: frozen dataclasses that describe an object to build and travel through YAML and checkpoints as plain data.

A variant is a new part, never a new flag. A part is written as a plain dictionary, so that a checkpoint that holds it
can be loaded with ``weights_only=True``; only classes that derive from `Part` are ever built from such a dictionary.
"""

import dataclasses
import enum
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from lightning_lm.deprecation import new_argument
from lightning_lm.errors import ConfigurationError

__all__ = ["Limit", "Part", "check_numbers", "kept_values"]

_KEY = "part"


class Limit(enum.Enum):
    """Range that a number of a part or of a constructor must lie in."""

    POSITIVE = "above 0"
    NON_NEGATIVE = "at least 0"
    COUNT = "at least 1"
    FRACTION = "from 0 to 1"
    BELOW_ONE = "at least 0 and below 1"
    INSIDE_ONE = "above 0 and below 1"
    UP_TO_ONE = "above 0 and at most 1"
    FINITE = "a finite number"

    def admits(self, number: float) -> bool:
        """Return whether a number lies in the range; NaN and infinity lie in none.

        Args:
            number: Value to check.
        """
        if isinstance(number, float) and not math.isfinite(number):
            return False
        return {
            Limit.POSITIVE: number > 0,
            Limit.NON_NEGATIVE: number >= 0,
            Limit.COUNT: number >= 1,
            Limit.FRACTION: 0 <= number <= 1,
            Limit.BELOW_ONE: 0 <= number < 1,
            Limit.INSIDE_ONE: 0 < number < 1,
            Limit.UP_TO_ONE: 0 < number <= 1,
            Limit.FINITE: True,
        }[self]


def check_numbers(limits: Mapping[str, Limit], values: Mapping[str, Any]) -> None:
    """Refuse numbers that are out of range; other values than numbers, and sequences of them, are passed over.

    Args:
        limits: Range of each value by name.
        values: Values by name.

    Raises:
        ConfigurationError: If a number is out of range.
    """
    for name, limit in limits.items():
        value = values[name]
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(limit.admits(number) for number in numbers if isinstance(number, int | float)):
            raise ConfigurationError(f"{name}={value} must be {limit.value}.")


class _Open:
    """A base that is no dataclass: for jsonargparse a class of nothing but dataclasses stands for itself alone.

    With it ``LightningCLI`` takes subclasses of a part wherever the part is the type, without a setting of the parser.
    """

    _usage: ClassVar[str] = ""

    def __new__(cls, *arguments: Any, **_: Any) -> Self:
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        unnamed = arguments[sum(not field.kw_only for field in fields) :]
        if unnamed:
            names = ", ".join(f"{field.name}=" for field in fields)
            raise ConfigurationError(
                f"{cls.__name__} takes its settings by name ({names}), got {type(unnamed[0]).__name__} without one."
                f"{cls._usage.format(cls.__name__)}"
            )
        return super().__new__(cls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(_Open):
    """Base of every part. Subclasses are frozen, keyword-only dataclasses; a single required field may come unnamed.

    ``class Mine(Part, limits={"rate": Limit.POSITIVE})`` has the range of a number checked when a part is made.
    """

    registry: ClassVar[dict[str, type["Part"]]] = {}
    _limits: ClassVar[Mapping[str, Limit]] = {}

    def __post_init__(self) -> None:
        check_numbers(self._limits, vars(self))

    def __init_subclass__(cls, *, limits: Mapping[str, Limit] = types.MappingProxyType({}), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._limits = {**cls._limits, **limits}
        Part.registry[cls.__name__] = cls

    def to_dict(self) -> dict[str, Any]:
        """Return this part as plain data (dictionaries, lists, numbers, strings)."""
        fields = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {_KEY: type(self).__name__, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build the part that `to_dict` described.

        Raises:
            ConfigurationError: If the data names no known part, a part of another kind, or an unknown field.
        """
        part = _build(data)
        if not isinstance(part, cls):
            raise ConfigurationError(f"Expected a {cls.__name__}, got {type(part).__name__}.")
        return part


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _build(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_build(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    fields = {key: _build(item) for key, item in value.items() if key != _KEY}
    if _KEY not in value:
        return fields
    cls = Part.registry.get(value[_KEY])
    if cls is None:
        raise ConfigurationError(
            f"No part is called {value[_KEY]!r}. If it is your own class, import its module before loading."
        )
    fields = {new_argument(cls, key) or key: item for key, item in fields.items()}
    unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise ConfigurationError(f"{cls.__name__} has no field {sorted(unknown)}; was this written by another version?")
    return cls(**fields)


def kept_values(default: Part, given: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the numbers of a default part that ended up in the part that replaced it, by the dotted path of each.

    jsonargparse keeps the arguments of a class that is replaced if the new one has them too.

    Args:
        default: The default of the argument.
        given: The argument as it was parsed: ``{"class_path": ..., "init_args": {...}}``.

    Yields:
        Path below the argument, the value that was kept, and the new class's own default.
    """
    cls = Part.registry.get(str(given.get("class_path")).rpartition(".")[2]) if isinstance(given, Mapping) else None
    if cls is None:
        return
    arguments = given.get("init_args", {})
    for field in dataclasses.fields(cls):
        own, value = field.default, arguments.get(field.name)
        if cls is type(default):
            own = getattr(default, field.name)
        elif _plain(value) == _plain(getattr(default, field.name, own)) != _plain(own) != dataclasses.MISSING:
            yield field.name, value, _plain(own)
        if isinstance(own, Part):
            yield from ((f"{field.name}.{path}", *values) for path, *values in kept_values(own, value))

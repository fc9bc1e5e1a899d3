"""Keys of the entries of a road, read with the place where they are written."""

import difflib
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_lm.cli.config.overlays import Setting, plain
from lightning_lm.errors import UsageError

__all__ = ["check_keys", "command_words", "nearest", "settings_of", "text_of", "value_of"]


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return a question about the choice that is nearest to a word, or nothing.

    Args:
        word: A word that is none of the choices.
        choices: Names.
    """
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def command_words(command: str, name: str, entry: Setting) -> tuple[str, ...]:
    """Return the words of a stage's or a score's command after ``lightning-lm``.

    Args:
        command: Text of the command.
        name: Name of its owner.
        entry: Keys of its owner.

    Raises:
        UsageError: If it cannot be split, or is a road itself.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"command: of {name!r} in {entry.place} cannot be split into words: {error}.") from error
    words = words[1:] if words[:1] == ["lightning-lm"] else words
    if not words or words[0] == "road":
        raise UsageError(f"command: of {name!r} in {entry.place} must be a verb and its options.")
    return tuple(words)


def check_keys(entry: Setting, known: Sequence[str], owner: str) -> None:
    """Refuse keys that mean nothing.

    Args:
        entry: Keys and their values.
        known: Keys that there are.
        owner: Name of their owner, for the message.

    Raises:
        UsageError: If there is another.
    """
    for key, setting in entry.value.items():
        if key not in known:
            raise UsageError(
                f"Unknown key {key!r} in {owner}.{nearest(key, known)}\n  Written in {setting.place}.\n"
                f"  {owner[0].upper()}{owner[1:]} takes: {', '.join(known)}."
            )


def value_of(entry: Setting, key: str, default: Any) -> Any:
    """Return the value of a key.

    Args:
        entry: Keys and their values.
        key: Key.
        default: Value if it is not there.
    """
    return entry.value[key].value if key in entry.value else default


def text_of(entry: Setting, key: str) -> str | None:
    """Return the text of a key; ``None`` if it is not there.

    Args:
        entry: Keys and their values.
        key: Key.

    Raises:
        UsageError: If the value is no text.
    """
    value = value_of(entry, key, None)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{key}: in {entry.value[key].place} must be a text, got {plain(entry.value[key])!r}.")
    return value


def settings_of(entry: Setting, name: str) -> dict[str, Any]:
    """Return the options under ``settings``.

    Args:
        entry: Keys and their values.
        name: Name of their owner.

    Raises:
        UsageError: If they are no options.
    """
    settings = entry.value.get("settings", Setting({}))
    if settings.value is None:
        return {}
    if not isinstance(settings.value, dict):
        raise UsageError(
            f"settings: of {name!r} in {settings.place} must hold options of fit, such as trainer.max_steps: 100."
        )
    return dict(plain(settings))

"""One readable block from jsonargparse's report, which lists every alternative that it tried."""

import re
import traceback
from collections.abc import Sequence

from lightning_lm.cli.config.overlays import Place, Setting

__all__ = ["explain", "is_a_users_mistake", "with_place"]

_KEY = re.compile(r'Parser key "(?P<key>[^"]+)":')
_OPTION = re.compile(r"Option '(?P<key>[^']+)' is not accepted")
_FRAME = re.compile(r"Does not validate|Subtypes:|Errors:|Given value|Problem with given|Parser key|^$")
_REFUSAL = re.compile(r"Problem with given class_path")
_ALTERNATIVE = re.compile(
    r"Expected a <class 'NoneType'>|does not correspond to a subclass|dot import path|No module named"
)

_OUT_OF_RANGE = re.compile(r"\w+=.* must be ")
_NOTHING = re.compile(r"model: missing: model")

_LONGEST = 1_000
_REFUSES = re.compile(r"[/\\](lightning|lightning_utilities|jsonargparse)[/\\]")


def explain(message: str, layers: Sequence[Setting]) -> str:
    """Return what is wrong, and where it was written.

    Args:
        message: Error message of jsonargparse.
        layers: The overlays and the command line, in the order in which they apply.
    """
    keys, reason = _deepest_reason(message)
    if reason is None:
        return _shortened(message.strip())
    option = _OPTION.search(reason)
    if option:
        keys, reason = [*keys, option["key"]], "there is no such key"
    path = ".".join(keys)
    lines = [f"{path}: {reason}" if path else reason]
    if _NOTHING.match(lines[0]):
        lines = ["model.model is missing: name a recipe, such as --config pretrain/quickstart, or a model"]
        lines[0] += ", such as --model.model TransformerConfig."
    lines[0] = _shortened(lines[0])
    place = _place(layers, path.split("."))
    if place is None:  # what a constructor refuses comes without the key, but begins with the argument's name
        named = re.match(r"\W*(\w+)", reason)
        place = _place_of_name(layers, named[1]) if named else None
    if place is not None:
        lines.append(f"  Written in {place}.")
    return "\n".join(lines)


def with_place(message: str, layers: Sequence[Setting]) -> str:
    """Return the message of a constructor, such as ``lr=-1 must be at least 0``, with the place of that setting.

    Args:
        message: Error message that may begin with the name of an argument.
        layers: The overlays and the command line, in the order in which they apply.
    """
    named = re.match(r"(\w+)(=| must )", message)
    place = _place_of_name(layers, named[1]) if named else None
    return message if place is None else f"{message}\n  Written in {place}."


def is_a_users_mistake(error: BaseException) -> bool:
    """Tell whether an exception was raised by Lightning or by the parser itself, which refuse a setting.

    Everything else keeps its traceback: it comes from the user's own classes, or is a bug.

    Args:
        error: An exception that was caught.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and bool(_REFUSES.search(frames[-1].filename))


def _deepest_reason(message: str) -> tuple[list[str], str | None]:
    """Return the keys that lead to the innermost complaint, and that complaint (alternatives joined by "or")."""
    frames: list[tuple[int, str]] = []
    keys: list[str] = []
    reasons: list[str] = []
    refused: list[str] = []  # what the class that was named says; the other alternatives do not matter then
    refusal: int | None = None
    for line in message.splitlines():
        text = line.lstrip(" -")
        indent = len(line) - len(text)
        frames = [frame for frame in frames if frame[0] < indent]
        match = _KEY.search(text)
        if match:
            frames.append((indent, match["key"]))
        refusal = indent if _REFUSAL.search(text) else refusal if refusal is not None and indent > refusal else None
        if _FRAME.search(text) or _ALTERNATIVE.search(text) or len(frames) < len(keys):
            continue
        if len(frames) > len(keys):
            keys, reasons = [key for _, key in frames], []
        (refused if refusal is not None or _OUT_OF_RANGE.match(text) else reasons).append(_plain_words(text))
    reasons = refused or reasons
    return keys, " or ".join(dict.fromkeys(reasons)).replace(" or needs ", " or ") or None


def _shortened(message: str) -> str:
    """Leave out the middle of a message that quotes a long value."""
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"


def _plain_words(reason: str) -> str:
    reason = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", reason)
    reason = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", reason)
    reason = re.sub(r"Expected an? (.*?)(?:\. Got value: (.*))?$", r"needs \1, got \2", reason).removesuffix(", got ")
    return reason.replace("the following arguments are required:", "missing:")


def _place(layers: Sequence[Setting], keys: Sequence[str]) -> Place | None:
    """Return the place of the last setting of a key, or of the nearest key above it that was written at all."""
    best: tuple[int, Place | None] = (0, None)
    for layer in layers:
        depth, setting = 0, layer
        for key in keys:
            below = _below(setting, key)
            if below is None:
                break
            depth, setting = depth + 1, below
        if depth >= max(best[0], 1):
            best = (depth, setting.place)
    return best[1]


def _place_of_name(layers: Sequence[Setting], name: str) -> Place | None:
    """Return the last place in which a key of this name was written, at any depth."""
    found: Place | None = None
    for setting in layers:
        value = setting.value
        if isinstance(value, dict) and name in value:
            found = value[name].place
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        found = _place_of_name([*children], name) or found
    return found


def _below(setting: Setting, key: str) -> Setting | None:
    for holder in (setting, _init_args(setting)):
        if holder is not None and isinstance(holder.value, dict) and key in holder.value:
            found: Setting = holder.value[key]
            return found
    return None


def _init_args(setting: Setting) -> Setting | None:
    return setting.value.get("init_args") if isinstance(setting.value, dict) else None

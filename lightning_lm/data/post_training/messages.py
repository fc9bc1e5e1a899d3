"""Messages as people store them, read as ``{"role", "content"}``.

Read besides lists of these: ``from`` and ``value`` of ShareGPT with its roles (``human``, ``gpt``, ``observation``,
``function_call``), a single message, JSON text, and the masks ``weight``, ``train``, ``training`` and ``loss`` of
single messages, which all become ``weight``, 0 or 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lm.errors import DataError
from lightning_lm.storage.json_text import parse_json

__all__ = ["Instruction", "Record", "checked_text", "messages_of"]

Record = dict[str, Any]


class Instruction(str):
    """A request as text, which a completion does not run on from: `Plain` ends it with a line break."""

    __slots__ = ()


_ROLES = {
    **{role: role for role in ("user", "assistant", "system", "tool", "developer", "function_call")},
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
    **dict.fromkeys(("human", "prompter"), "user"),
}
"""Roles of ShareGPT, and their usual names; in any case of letters."""
_MARKS = ("weight", "train", "training", "loss")
"""Masks of single messages: of OpenAI, of axolotl (two names) and of ms-swift."""
_SPOKEN = ("content", "tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")


def messages_of(value: Any, field: str, keys: tuple[str, str] | None = None) -> list[Record]:
    """Return messages with ``role`` and ``content``, and ``weight`` if a message has a mask.

    Args:
        value: A list of messages, one message, or either as JSON text.
        field: Name of the field, for errors.
        keys: Names of role and content in a message; found in each message by default.

    Raises:
        DataError: If these are no messages; names the field and the message.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DataError(
                f"{field} is a text that is not JSON ({value[:60]!r}); a list of messages with role and content is "
                "needed, or its JSON."
            ) from error
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(
            f"{field} is a {type(value).__name__} ({str(value)[:60]!r}); a text or a list of messages is needed."
        )
    return [_message(turn, f"{field}[{place}]", keys) for place, turn in enumerate(value)]


def checked_text(value: Any, field: str) -> str:
    """Return a text.

    Args:
        value: As it stands in the data.
        field: Name of the field, for errors.

    Raises:
        DataError: If it is no text, or has a lone surrogate, which no tokenizer can encode.
    """
    if not isinstance(value, str):
        raise DataError(f"{field} is a {type(value).__name__} ({str(value)[:60]!r}); a text is needed.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{field} has half of a character (the lone surrogate {value[error.start]!r}) at position "
                f"{error.start}, which cannot be encoded; fix or remove the record."
            ) from error
    return value


def _message(turn: Any, place: str, keys: tuple[str, str] | None) -> Record:
    if not isinstance(turn, Mapping):
        raise DataError(
            f"{place} is a {type(turn).__name__} ({str(turn)[:60]!r}); a message with role and content is needed."
        )
    role_key, content_key = keys or (("from", "value") if "from" in turn else ("role", "content"))
    role, content = turn.get(role_key), turn.get(content_key)
    if not isinstance(role, str):
        raise DataError(f"{place} has no {role_key!r}, but {sorted(turn)}; a message needs a role and a content.")
    spelled = role.strip().lower()
    if role_key != "role" and spelled not in _ROLES:
        raise DataError(f"{place}.{role_key} is {role!r}; it must be one of {', '.join(sorted(_ROLES))}.")
    role = _ROLES.get(spelled, role)
    kept = {name: item for name, item in turn.items() if name not in (role_key, content_key, *_MARKS)}
    message = {"role": role, "content": content, **kept}
    if role == "function_call" and role_key != "role":
        message.update(role="assistant", content="", tool_calls=_tool_calls(content, f"{place}.{content_key}"))
    _check_content(message, f"{place}.{content_key}")
    weight = _weight(turn, message["role"], place)
    return message if weight is None else {**message, "weight": weight}


def _check_content(message: Record, field: str) -> None:
    content = message["content"]
    if isinstance(content, str):
        checked_text(content, field)
    elif isinstance(content, Sequence):
        for place, part in enumerate(content):
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                checked_text(part["text"], f"{field}[{place}].text")
    elif content is not None or not any(message.get(name) for name in _SPOKEN):
        raise DataError(f"{field} is {content!r}; a text is needed. The message has {sorted(message)}.")


def _tool_calls(value: Any, field: str) -> list[Record]:
    """Return the calls of a ``function_call`` turn, whose text is JSON of one call or several."""
    try:
        calls = parse_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{field} is no JSON ({value[:60]!r}); a function's name and arguments are needed.") from error
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise DataError(f"{field} is {str(value)[:60]!r}; a function's name and arguments are needed.")
    return [{"type": "function", "function": dict(call)} for call in calls]


def _weight(turn: Mapping[str, Any], role: str, place: str) -> int | None:
    """Return whether a message is trained on, by its own mask; ``None`` if it has none."""
    marks = {name: turn[name] for name in _MARKS if turn.get(name) is not None}
    if turn.get("train_detail") or turn.get("training_detail"):
        raise DataError(f"{place} masks parts of its text (train_detail), which is not supported; mask whole messages.")
    for name, value in marks.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(f"{place}.{name} is {value!r}; it must be 0 or 1 (or false, true).")
    if len({bool(value) for value in marks.values()}) > 1:
        raise DataError(f"{place} has masks that contradict each other: {marks}.")
    weight = int(next(iter(marks.values()))) if marks else None
    if weight and role != "assistant":
        raise DataError(
            f"{place} is a message of {role!r} with {next(iter(marks))}={next(iter(marks.values()))!r}, and only those "
            "of 'assistant' can be trained on. Set it to 0, or train on every token with "
            "--data.rows.train_on all and without masks."
        )
    return weight

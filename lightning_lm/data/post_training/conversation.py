"""Messages as a chat template wants them.

Data comes in forms that a template may not read: content as text or in parts, the arguments of tool calls as JSON text
(OpenAI's own form) or as an object, thoughts under one of three names. The fields that a template reads are found once,
by rendering short conversations; messages are then brought into that form. A message that a template reads already is
left as it is, so that the text is that of transformers.

Special tokens in what users, tools and tool schemas say would be obeyed in the text that a template writes. `seal`
marks them, so that they are encoded as ordinary text.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lightning_lm.errors import DataError, TokenizerError
from lightning_lm.storage.json_text import parse_json
from lightning_lm.tokenizers.chat_template import Message, render_chat_template

__all__ = ["REASONING", "Dialect", "dialect_of", "free_character", "normalized", "normalized_tools", "seal"]

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of thoughts; templates read the first, or the second."""

_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Forms of messages that a chat template accepts.

    Args:
        text: Accept text as content.
        parts: Accept a list of parts as content.
        arguments: Type of the arguments of a tool call.
        empty_content: Content of a message that is only tool calls: a missing one, None, or a text.
    """

    text: bool = True
    parts: bool = True
    arguments: Literal["object", "text"] = "object"
    empty_content: Any = _MISSING


@functools.lru_cache(maxsize=64)
def dialect_of(template: str, named_tokens: tuple[tuple[str, str], ...]) -> Dialect:
    """Return the fields that a chat template reads.

    Args:
        template: A Jinja template.
        named_tokens: Names and texts of special tokens.
    """

    def written(messages: list[Message]) -> str:
        try:
            return render_chat_template(template, messages, dict(named_tokens))
        except TokenizerError:
            return ""

    parts = [{"type": "text", "text": word} for word in ("first", "second")]
    as_parts = written([{"role": "user", "content": parts}])
    reads_parts = "first" in as_parts and "second" in as_parts and not re.search(r"['\"](text|type)['\"]", as_parts)
    reads_text = "first" in written([{"role": "user", "content": "first"}]) or not reads_parts
    arguments, empty = _tool_calls(written, "first" if reads_text else parts)
    return Dialect(reads_text, reads_parts, arguments, empty)


def _tool_calls(written: Callable[[list[Message]], str], asked: Any) -> tuple[Literal["object", "text"], Any]:
    for empty in (_MISSING, None, ""):
        for kind, arguments in (("object", {"key": "value"}), ("text", '{"key": "value"}')):
            function = {"name": "find", "arguments": arguments}
            call = {"id": "call00001", "type": "function", "function": function}
            message = {"role": "assistant", **({} if empty is _MISSING else {"content": empty}), "tool_calls": [call]}
            text = written([{"role": "user", "content": asked}, message])
            if "find" in text and "value" in text and "{'key'" not in text and '\\"key' not in text:
                return ("object" if kind == "object" else "text"), empty
    return "object", _MISSING


def normalized(messages: Sequence[Message], dialect: Dialect) -> list[dict[str, Any]]:
    """Return messages in the form that a template reads.

    Args:
        messages: As they stand in the data.
        dialect: Forms that the template accepts.

    Raises:
        DataError: If a message has a form that the template does not read.
    """
    return [_message(message, dialect, number) for number, message in enumerate(messages)]


def _message(message: Message, dialect: Dialect, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"Message {number} must be an object with a 'role' and a 'content', got {str(message)[:80]!r}.")
    made = {name: value for name, value in message.items() if value is not None}
    reasoning = next((made[name] for name in REASONING if name in made), None)
    if reasoning is not None:
        made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
    if made.get("tool_calls"):
        made["tool_calls"] = [_tool_call(call, dialect, number) for call in _list(made["tool_calls"], "tool_calls")]
        if "content" not in made and dialect.empty_content is not _MISSING:
            made["content"] = dialect.empty_content
    else:
        made.pop("tool_calls", None)
        if not {"content", "tool_responses", *REASONING} & set(made):
            raise DataError(f"Message {number} ({made['role']!r}) has neither content nor tool calls.")
    if made.get("content") is not None:
        made["content"] = _content(made["content"], made["role"], dialect, number)
    return made


def _content(content: Any, role: str, dialect: Dialect, number: int) -> Any:
    if isinstance(content, str):
        return content if dialect.text else [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        if role == "tool":
            return content
        raise DataError(
            f"The content of message {number} ({role!r}) is a {type(content).__name__}; a text or a list of parts is "
            "needed."
        )
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    kinds = [
        part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else None for part in parts
    ]
    texts = [part.get("text") if kind == "text" else None for part, kind in zip(parts, kinds, strict=True)]
    if all(isinstance(text, str) for text in texts):
        return content if dialect.parts else "".join(map(str, texts))
    if role == "tool" and not any(kinds):
        return content
    kind = kinds[[isinstance(text, str) for text in texts].index(False)]
    raise DataError(
        f"The content of message {number} ({role!r}) has a part of type {kind!r}; models here read text only. Take it "
        "out of the data."
    )


def _tool_call(call: Any, dialect: Dialect, number: int) -> Any:
    if not isinstance(call, Mapping):
        raise DataError(f"A tool call of message {number} is a {type(call).__name__}, not an object.")
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _tool_call(call["function"], dialect, number)}
    arguments = call.get("arguments")
    if dialect.arguments == "text" and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if dialect.arguments == "object" and isinstance(arguments, str):
        return {**call, "arguments": _parsed(arguments, f"The arguments of a tool call of message {number}")}
    return dict(call)


def normalized_tools(tools: Any) -> list[Any] | None:
    """Return tool schemas as a list of objects; None if there is none.

    Args:
        tools: A list of schemas, or JSON text of one, as it stands in Parquet files.

    Raises:
        DataError: If it is neither.
    """
    schemas = [_parsed(tool, "A tool") if isinstance(tool, str) else tool for tool in _list(tools, "tools")]
    return schemas or None


def _list(value: Any, name: str) -> list[Any]:
    value = _parsed(value, name) if isinstance(value, str) and value.strip() else value
    if not value:
        return []
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        raise DataError(f"{name} must be a list, got a {type(value).__name__}.")
    return list(value)


def _parsed(text: str, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{what}: {text[:60]!r} is no JSON ({error}).") from error


def free_character(value: Any) -> str:
    """Return a character that occurs in no text of a value.

    Args:
        value: Messages, tools.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    return next(letter for letter in map(chr, range(0xE000, 0xF8FF)) if letter not in text)


def seal(value: Any, special: re.Pattern[str] | None, mark: str) -> Any:
    """Return a value whose texts have a mark after the first character of each special token.

    Args:
        value: A text, or lists and objects of such.
        special: Finds special tokens.
        mark: A character that occurs in no text.
    """
    if special is None:
        return value
    if isinstance(value, str):
        return special.sub(lambda found: found.group()[0] + mark + found.group()[1:], value)
    if isinstance(value, Mapping):
        return {seal(key, special, mark): seal(item, special, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [seal(item, special, mark) for item in value]
    return value

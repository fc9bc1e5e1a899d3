"""Assistant spans of a rendered conversation, for chat templates that do not mark them.

A chat template is a program, so its text has no structure to read. Renderings are compared instead: the text of the
conversation up to a turn, with the prompt for the completion, ends where the turn begins; the turn ends at the special
token that is the same whether or not another message follows.

Templates change what they wrote before once more follows: thoughts of earlier turns are dropped, the prompt for the
answer ends in ``<think>`` and the completion has none, an end of text follows the last turn only. Places are
therefore found relative to a message that both renderings have: it is rendered a second time with other content, and
the texts are the same again after it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_lm.errors import DataError, TokenizerError

__all__ = ["AssistantTurns", "Turn"]

_PROBE = "\uf8ff"
"""Stands for content; it occurs in no template and in no sealed text."""

Messages = Sequence[Mapping[str, Any]]


class Turn(NamedTuple):
    """Text of the assistant in one turn.

    Args:
        begin: Place in the text where it begins.
        end: Position after it, its end mark included.
        missing_end: The end mark where the text has none, because the template lets the next turn's token end a turn
            and there is no next one; mostly empty.
    """

    begin: int
    end: int
    missing_end: str


class _Closed(NamedTuple):
    """Text that follows a turn.

    Args:
        begin: Start of the part that is the same whether or not another message follows.
        end: End of that part.
        after: Position after the content of the turn, from where its end mark is looked for if that part has none.
        followed_by: Text at this place if another message follows.
    """

    begin: int
    end: int
    after: int
    followed_by: str


class AssistantTurns:
    """Finds the turns of the assistant in a rendered conversation.

    Args:
        messages: The conversation.
        write: Renders messages; its second argument adds the prompt for a completion.
        special: Finds special tokens.

    Attributes:
        text: The rendered conversation.
    """

    def __init__(
        self, messages: Messages, write: Callable[[Messages, bool], str], special: re.Pattern[str] | None
    ) -> None:
        self._messages, self._special = list(messages), special
        self._write = write
        self.text = write(messages, False)

    def begin(self, number: int) -> int:
        """Return the position at which a turn begins, after the part of its generation prompt in the text.

        Args:
            number: Index of the message.

        Raises:
            DataError: If the position is ambiguous.
        """
        before = self._messages[:number]
        try:
            prompt = self._write(before, True)
        except TokenizerError:
            if before:
                raise
            return self._aligned(_shared(self.text, self._other(number)))
        if self.text.startswith(prompt) and prompt:
            return len(prompt)
        if not before:
            return self._aligned(_shared(self.text, self._other(number)))
        anchor, prompt_anchor = self._after(number - 1, self._messages), self._after(number - 1, before, True)
        other, rest = self._other(number), prompt[prompt_anchor:]
        shared = _shared(self.text[anchor:], rest)
        if shared < len(rest) and other[:anchor] == self.text[:anchor]:
            shared = min(shared, _shared(other[anchor:], rest))
        if rest and not shared:
            raise DataError(_unsafe(number, f"its prompt {rest[:60]!r} does not stand in the text"))
        return self._aligned(anchor + shared)

    def turn(self, number: int) -> Turn:
        """Return where a turn begins and ends.

        Args:
            number: Index of the message.

        Raises:
            DataError: If a position is ambiguous, or the turn has no end mark.
        """
        begin = self.begin(number)
        turn = self._ended(number, begin)
        if number + 1 < len(self._messages) and self._messages[number + 1].get("role") == "tool":
            result = self._other(number + 1, or_same=True)
            if _shared(self.text, result) < turn.end:
                raise DataError(_unsafe(number, "the result of a tool stands within it"))
        return turn

    def _ended(self, number: int, begin: int) -> Turn:
        closed = self._closed(number, begin)
        marks = list(self._marks(self.text[closed.begin : closed.end]))
        if marks and not self.text[closed.begin + marks[-1].end() : closed.end].strip():
            return Turn(begin, closed.begin + marks[-1].end(), "")
        after = self.text[closed.after :]
        first = self._first_mark(after)
        if first is not None:
            return Turn(begin, closed.after + first.end(), "")
        first = self._first_mark(closed.followed_by)
        if first is None or after.strip():
            raise DataError(
                f"The chat template ends the assistant's message {number} without a special token "
                f"({self.text[begin:][-40:]!r}), so a model could not learn to stop. Use ChatML(), or a template that "
                "writes one: TokenizerTemplate(path='chat_template.jinja')."
            )
        return Turn(begin, closed.after, first.group())

    def _closed(self, number: int, begin: int) -> "_Closed":
        """Return the text that follows a turn."""
        closed = self._messages[: number + 1]
        alone = self._write(closed, False)
        followed, following = self._followed(number)
        if followed is not None and followed.startswith(alone) and self.text.startswith(alone):
            return _Closed(begin, len(alone), len(alone), followed[len(alone) :])
        after = self._after(number, self._messages)
        others = [alone[self._after(number, closed) :]]
        others += [] if followed is None else [followed[self._after(number, following) :]]
        same = min(_shared(self.text[after:], other) for other in others)
        said = same if same == len(others[0]) else 0
        return _Closed(after, after + same, after + said, others[-1][said:] if followed is not None else "")

    def _followed(self, number: int) -> tuple[str | None, Messages]:
        """Return the text in which another message follows, and its messages."""
        if number + 1 < len(self._messages):
            return self.text, self._messages
        message = self._messages[number]
        role = "tool" if message.get("tool_calls") else "user"
        content: Any = _PROBE
        if not isinstance(message.get("content") or "", str):
            content = [{"type": "text", "text": _PROBE}]
        following = [*self._messages, {"role": role, "content": content, "name": _PROBE}]
        try:
            return self._write(following, False), following
        except TokenizerError:
            return None, following

    def _other(self, number: int, *, or_same: bool = False) -> str:
        """Return the text with other content in a message; the text itself where no content is written, if allowed."""
        for changed in _changed(self._messages[number]):
            text = self._rewritten(number, changed, self._messages, False)
            if text is not None and text != self.text:
                return text
        if or_same:
            return self.text
        raise DataError(_unsafe(number, "its content does not stand in the text"))

    def _after(self, number: int, messages: Messages, answering: bool = False) -> int:
        """Return the position after the content of a message in the text of messages."""
        text = self._write(messages, answering)
        for changed in _changed(messages[number]):
            other = self._rewritten(number, changed, messages, answering)
            if other is not None and other != text:
                most = min(len(text), len(other)) - _shared(text, other)
                return len(text) - min(most, _shared(text[::-1], other[::-1]))
        raise DataError(_unsafe(number, "its content does not stand in the text"))

    def _rewritten(self, number: int, changed: Mapping[str, Any], messages: Messages, answering: bool) -> str | None:
        try:
            return self._write([*messages[:number], changed, *messages[number + 1 :]], answering)
        except TokenizerError:
            return None

    def _marks(self, text: str) -> Iterator[re.Match[str]]:
        return iter(()) if self._special is None else self._special.finditer(text)

    def _first_mark(self, text: str) -> re.Match[str] | None:
        """Return the first special token of a text, if nothing but blanks stands before it."""
        first = next(self._marks(text), None)
        return first if first is not None and not text[: first.start()].strip() else None

    def _aligned(self, place: int) -> int:
        """Return a place, or the begin of the special token in whose middle it is."""
        around = (mark for mark in self._marks(self.text) if mark.start() < place < mark.end())
        return next((mark.start() for mark in around), place)


def _changed(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a message with other content: a probe in its middle or instead of it, other arguments of its calls."""
    content = message.get("content")
    calls = {"tool_calls": [_changed_call(call) for call in message["tool_calls"]]} if message.get("tool_calls") else {}
    if message.get("role") != "assistant":
        yield {
            **message,
            "content": _replaced(content, lambda text: f"{text[: len(text) // 2]}{_PROBE}{text[len(text) // 2 :]}"),
        }
    probed = {} if content is None or (calls and not content) else {"content": _replaced(content, lambda _: _PROBE)}
    yield {**message, **probed, **calls}
    if calls:
        yield {**message, **calls}
        yield {**message, "content": _PROBE}


def _replaced(content: Any, change: Callable[[str], str]) -> Any:
    if isinstance(content, str):
        return change(content)
    if isinstance(content, Mapping):
        return {
            name: change(item) if name != "type" and isinstance(item, str) else item for name, item in content.items()
        }
    if isinstance(content, list | tuple) and content:
        return [*content[:-1], _replaced(content[-1], change)]
    return change("")


def _changed_call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _changed_call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        return {**call, "arguments": json.dumps({_PROBE: _PROBE}, ensure_ascii=False)}
    return {**call, "arguments": dict.fromkeys(arguments or [_PROBE], _PROBE)}


def _shared(left: str, right: str) -> int:
    """Return how many characters two texts begin with alike."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low


def _unsafe(number: int, reason: str) -> str:
    return (
        f"Message {number} cannot be located in the output of the chat template: {reason}. Use another template: one "
        "with {% generation %} tags by TokenizerTemplate(path='chat_template.jinja'), or ChatML()."
    )

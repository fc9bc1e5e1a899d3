"""Conversations by the chat template of a tokenizer, or by any other Jinja program.

Target tokens are those in the template's own ``{% generation %}`` blocks, or else those that `AssistantTurns` finds by
comparing renderings.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lm.data.post_training.assistant_turns import AssistantTurns
from lightning_lm.data.post_training.chat import (
    ChatTemplate,
    Content,
    Message,
    Rendered,
    encode_after,
    is_target,
    turns_of,
)
from lightning_lm.data.post_training.conversation import (
    REASONING,
    dialect_of,
    free_character,
    normalized,
    normalized_tools,
    seal,
)
from lightning_lm.errors import ConfigurationError, DataError, TokenizerError
from lightning_lm.protocols import Tokenizer
from lightning_lm.tokenizers.chat_template import render_chat_template
from lightning_lm.tokenizers.streams import special_expression

__all__ = ["TokenizerTemplate"]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = ("\ufdd0", "\ufdd1")
"""Around generation blocks. Unicode has set these apart: they are no characters of any text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTemplate(ChatTemplate):
    """The chat template that came with the tokenizer, or another: a program that writes a conversation as text.

    Args:
        variables: Further variables of the template, such as ``enable_thinking`` or ``tools``.
        path: File of another template, such as ``chat_template.jinja``; by default the tokenizer's own is used.
        text: Another template, as text.

    Raises:
        ConfigurationError: If both ``path`` and ``text`` are given, or the file cannot be read.
    """

    variables: dict[str, Any] = dataclasses.field(default_factory=dict)
    path: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if self.path is not None and self.text is not None:
            raise ConfigurationError("TokenizerTemplate takes a path or a text, not both.")
        self._given  # noqa: B018  a file that cannot be read is said at once

    def to_dict(self) -> dict[str, Any]:
        """Return this part as plain data, with the content of the file instead of its name."""
        return {**super().to_dict(), "path": None, "text": self._given}

    def render(self, messages: Sequence[Message], tokenizer: Tokenizer, *, learn_from: int = 0) -> Rendered:
        """Return a conversation as token ids.

        Raises:
            DataError: If the template ends a completion without a token to stop at, or it cannot be told which part
                of the text is the assistant's.
            TokenizerError: If the template refuses the conversation.
        """
        writer = self._writer(messages, tokenizer)
        text, spans, missing_end = writer.answers(learn_from)
        writer.refuse_dropped_calls("".join(text[begin:end] for begin, end in spans), learn_from)
        ids: list[int] = []
        mask: list[bool] = []
        before = ""
        for begin, end, learned in _pieces(spans, len(text)):
            piece = writer.encode(before, text[begin:end])
            ids += piece
            mask += [learned] * len(piece)
            before = text[begin:end] or before
        if missing_end:
            ids.append(tokenizer.special_tokens[missing_end])
            mask.append(True)
        return Rendered(ids, mask)

    def prompt_ids(self, prompt: Content, tokenizer: Tokenizer) -> list[int]:
        """Return the turns of a prompt and the beginning of the assistant's."""
        writer = self._writer(turns_of(prompt, "user"), tokenizer)
        return writer.encode("", writer.write(writer.messages, True))

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the ids that end a completion: those after it in the template, and the tokenizer's end ids."""
        found: list[int] = []
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
        for said in ({"content": "2"}, {"content": "", "tool_calls": [call]}):
            asked: list[Message] = [{"role": "user", "content": "1"}, {"role": "assistant", **said}]
            try:
                writer = self._writer(asked, tokenizer)
                found += [tokenizer.special_tokens[mark] for mark in writer.end_marks()]
            except (DataError, TokenizerError):
                continue  # a template without tools, or one that wants other messages: the tokenizer's ids are left
        stops = tuple(dict.fromkeys([*found, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]))
        if not stops:
            raise ConfigurationError(
                "No token ends a completion: the chat template writes no special token after one, and the tokenizer "
                "has no eos_token. Name one in tokenizer_config.json."
            )
        return stops

    def for_record(self, record: Mapping[str, Any]) -> "TokenizerTemplate":
        """Return the template with the ``tools`` and ``chat_template_kwargs`` of a record among its variables."""
        given = dict(record.get("chat_template_kwargs") or {})
        tools = normalized_tools(record.get("tools"))
        given |= {} if tools is None else {"tools": tools}
        return dataclasses.replace(self, variables={**self.variables, **given}) if given else self

    def program(self, tokenizer: Tokenizer) -> str | None:  # noqa: ARG002
        """Return the Jinja program where it is not the tokenizer's own."""
        return self._given

    @functools.cached_property
    def _given(self) -> str | None:
        if self.path is None:
            return self.text
        try:
            return Path(self.path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"The chat template {self.path} cannot be read: {error}.") from error

    def _writer(self, messages: Sequence[Message], tokenizer: Tokenizer) -> "_Writer":
        template = self._given if self._given is not None else _template_of(tokenizer, self.variables)
        return _Writer(template, messages, tokenizer, self.variables)


def _template_of(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if variables.get("tools"):
        template = getattr(tokenizer, "tool_use_template", None) or template
    if template is None:
        kind = TokenizerError if hasattr(tokenizer, "prefix_ids") else ConfigurationError  # published, or trained here
        raise kind(
            f"{type(tokenizer).__name__} carries no chat template; use ChatML (--data.template ChatML), name a file by "
            "TokenizerTemplate(path='chat_template.jinja'), or use the tokenizer of a Hugging Face folder that has one."
        )
    return str(template)


class _Writer:
    """A conversation, the template that writes it, and the tokenizer that encodes the result."""

    def __init__(
        self, template: str, messages: Sequence[Message], tokenizer: Tokenizer, variables: Mapping[str, Any]
    ) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._special = special_expression(tokenizer.special_tokens)
        end = next((token for token, number in tokenizer.special_tokens.items() if number == tokenizer.eos_id), None)
        named = dict(getattr(tokenizer, "named_tokens", {} if end is None else {"eos_token": end}))
        dialect = dialect_of(template, tuple(named.items()))
        tools, messages = normalized_tools(variables.get("tools")), normalized(messages, dialect)
        self._mark = free_character([messages, tools])
        self.messages = [self._sealed(message) for message in messages]
        self._variables = {**named, **variables, "tools": seal(tools, self._special, self._mark)}

    def write(self, messages: Sequence[Message], answering: bool, marks: tuple[str, str] | None = None) -> str:
        """Return messages as text, in which sealed special tokens are still sealed."""
        variables = {**self._variables, "add_generation_prompt": answering}
        text = render_chat_template(self._template, messages, variables, generation_marks=marks)
        return text.replace(json.dumps(self._mark)[1:-1], "")  # a mark that a template wrote as ASCII

    def answers(self, learn_from: int) -> tuple[str, list[tuple[int, int]], str]:
        """Return the conversation as text, the spans to train on, and the end mark that the text lacks."""
        roles = [message["role"] == "assistant" for message in self.messages]
        learned = [is_target(message, number, learn_from) for number, message in enumerate(self.messages)]
        wanted = [number for number, answers in enumerate(roles) if answers and learned[number]]
        if _GENERATION.search(self._template):
            text, spans = _unmarked(self.write(self.messages, False, _MARKS))
            others = [number for number, answers in enumerate(roles) if answers and not learned[number]]
            return text, (self._of_turns(spans, wanted, others) if wanted else []), ""
        turns = AssistantTurns(self.messages, self.write, self._special)
        found = [turns.turn(number) for number in wanted]
        return turns.text, [(turn.begin, turn.end) for turn in found], found[-1].missing_end if found else ""

    def refuse_dropped_calls(self, said: str, learn_from: int) -> None:
        """Refuse tool calls that the template leaves outside the spans to train on.

        Args:
            said: Text of the target tokens.
            learn_from: As for `answers`.

        Raises:
            DataError: If one is outside.
        """
        learned = [message for number, message in enumerate(self.messages) if is_target(message, number, learn_from)]
        calls = [
            call for message in learned if message["role"] == "assistant" for call in message.get("tool_calls", ())
        ]
        names = [call.get("function", call).get("name") for call in calls]
        dropped = next((name for name in names if isinstance(name, str) and name not in said), None)
        if dropped is not None:
            raise DataError(
                f"The chat template does not write tool calls, so the call of {dropped!r} would be trained on as an "
                "empty completion. Use a template that does: TokenizerTemplate(path='chat_template.jinja')."
            )

    def end_marks(self) -> list[str]:
        """Return the special token that ends the last message."""
        turns = AssistantTurns(self.messages, self.write, self._special)
        turn = turns.turn(len(self.messages) - 1)
        marks = [] if self._special is None else self._special.findall(turns.text[turn.begin : turn.end])
        return [turn.missing_end] if turn.missing_end else marks[-1:]

    def encode(self, before: str, text: str) -> list[int]:
        """Return the ids of a text that follows another; sealed special tokens are ordinary text.

        Raises:
            DataError: If the tokenizer reads them as special tokens nevertheless.
        """
        ids: list[int] = []
        for piece, sealed in self._by_seal(text):
            plain = piece.replace(self._mark, "")
            piece_ids = encode_after(before.replace(self._mark, ""), plain, self._tokenizer, allow_special=not sealed)
            if sealed and not set(self._tokenizer.special_tokens.values()).isdisjoint(piece_ids):
                raise DataError(
                    f"A message has a special token in its text ({plain[:80]!r}), and this tokenizer cannot encode it "
                    "as ordinary text. Take it out of the data."
                )
            ids += piece_ids
            before = piece
        return ids

    def _by_seal(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield a text in pieces: sealed ones, and those between them."""
        if self._mark not in text or self._special is None:
            yield text, False
            return
        begin = 0
        borders = [0, *(place for found in self._special.finditer(text) for place in found.span()), len(text)]
        for left, right in itertools.pairwise(borders):
            if self._mark in text[left:right]:
                yield from ((text[begin:left], False), (text[left:right], True))
                begin = right
        yield text[begin:], False

    def _sealed(self, message: Message) -> dict[str, Any]:
        """Return a message in which only the text of the assistant may contain special tokens."""
        kept = ("role", "content", *REASONING) if message["role"] == "assistant" else ("role",)
        self._refuse_divided(message)
        return {
            name: value if name in kept else seal(value, self._special, self._mark) for name, value in message.items()
        }

    def _refuse_divided(self, message: Message) -> None:
        """Refuse a special token that is divided over parts of a content: the template would put it together."""
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, list | tuple) or self._special is None:
            return
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        if len(self._special.findall("".join(texts))) > sum(len(self._special.findall(text)) for text in texts):
            raise DataError(
                f"The parts of a message of {message['role']!r} make a special token where they meet "
                f"({''.join(texts)[:80]!r}). Take it out of the data."
            )

    def _of_turns(
        self, spans: Sequence[tuple[int, int]], wanted: Sequence[int], others: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Return those generation blocks that belong to the wanted turns: a turn reaches up to the next one's begin."""
        if not others:
            return list(spans)
        turns = AssistantTurns(self.messages, self.write, self._special)
        begins = [(turns.begin(number), number in wanted) for number in sorted([*wanted, *others])]
        return [
            (begin, end)
            for begin, end in spans
            if next((is_wanted for at, is_wanted in reversed(begins) if at < end), False)
        ]


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a text without the marks around generation blocks, and the places of these blocks."""
    spans: list[tuple[int, int]] = []
    plain, depth = "", 0
    for piece in re.split(f"([{''.join(_MARKS)}])", text):
        if piece not in _MARKS:
            if depth and piece:
                begin = spans.pop()[0] if spans and spans[-1][1] == len(plain) else len(plain)
                spans.append((begin, len(plain) + len(piece)))
            plain += piece
        else:
            depth += 1 if piece == _MARKS[0] else -1
    return plain, spans


def _pieces(spans: Sequence[tuple[int, int]], length: int) -> Iterator[tuple[int, int, bool]]:
    """Yield begin and end of consecutive pieces of a text, and whether each is trained on."""
    place = 0
    for begin, end in spans:
        yield place, begin, False
        yield begin, end, True
        place = end
    yield place, length, False

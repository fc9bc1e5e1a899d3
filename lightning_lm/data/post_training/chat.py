"""Conversations as token ids, with a mask of the tokens to train on.

Text is put together turn by turn. The prompt of a completion is tokenized by itself, exactly as at generation; the
completion follows, including the token that ends it. So no merge reaches from a prompt into
a completion, both completions of a preference continue the same ids, and a trained model has learned to stop.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_lm.data.post_training.messages import Instruction
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.parts import Part
from lightning_lm.protocols import Tokenizer

__all__ = [
    "ChatML",
    "ChatTemplate",
    "Content",
    "Message",
    "Plain",
    "Rendered",
    "begin_ids",
    "encode_pair",
]

Message = Mapping[str, Any]
"""One turn: ``role`` (``user``, ``assistant``, ``system``, ...) and ``content``."""
Content = str | Sequence[Message]
"""A prompt or a completion: text, or turns of a conversation."""


class Rendered(NamedTuple):
    """A conversation as token ids."""

    ids: list[int]
    learn_mask: list[bool]
    """True for the tokens of the assistant, including the one that ends its turn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate(Part):
    """Base of the ways to write conversations.

    Plain text is a conversation of one turn: a prompt is the user's message, a completion the assistant's.
    """

    def render(self, messages: Sequence[Message], tokenizer: Tokenizer, *, learn_from: int = 0) -> Rendered:
        """Return a conversation as token ids.

        Args:
            messages: The turns.
            tokenizer: Tokenizer of the model.
            learn_from: Index of the first turn that is trained on, unless the turn's own ``weight`` (0 or 1) decides.

        Raises:
            DataError: If a turn cannot be written.
        """
        raise NotImplementedError

    def prompt_ids(self, prompt: Content, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of a prompt with everything up to the first token of its completion.

        Args:
            prompt: Text, or turns.
            tokenizer: Tokenizer of the model.
        """
        raise NotImplementedError

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the ids that end a completion.

        Args:
            tokenizer: Tokenizer of the model.
        """
        raise NotImplementedError

    def for_record(self, record: Mapping[str, Any]) -> "ChatTemplate":  # noqa: ARG002
        """Return the template as a record wants it.

        Args:
            record: May hold more than turns, such as ``tools``.
        """
        return self

    def pair(self, prompt: Content, completion: Content, tokenizer: Tokenizer) -> tuple[list[int], Rendered]:
        """Return the ids of a prompt, and those of its completion up to the last target.

        Args:
            prompt: Text, or turns.
            completion: Text, or turns of which the first is the assistant's.
            tokenizer: Tokenizer of the model.

        Raises:
            DataError: If a turn cannot be written.
        """
        before, after = turns_of(prompt, "user"), turns_of(completion, "assistant")
        if not after or after[0].get("role") != "assistant":
            role = repr(after[0].get("role")) if after else "no message"
            raise DataError(f"A completion must start with an 'assistant' message, got {role}.")
        rendered = self.render([*before, *after], tokenizer, learn_from=len(before))
        if True not in rendered.learn_mask:
            raise DataError("Every assistant message of the completion has weight 0: nothing is trained on.")
        begin = rendered.learn_mask.index(True)
        end = len(rendered.ids) - rendered.learn_mask[::-1].index(True)
        return rendered.ids[:begin], Rendered(rendered.ids[begin:end], rendered.learn_mask[begin:end])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(ChatTemplate):
    """Prompt and completion as they are, between the tokenizer's BOS and its end of text.

    Args:
        read_special: Encode special tokens written in the text (``<|eot_id|>``) as such, not as characters.
    """

    read_special: bool = False

    def render(self, messages: Sequence[Message], tokenizer: Tokenizer, *, learn_from: int = 0) -> Rendered:  # noqa: ARG002
        """Refuse: plain text has no form for roles.

        Raises:
            DataError: Always.
        """
        raise _no_turns()

    def prompt_ids(self, prompt: Content, tokenizer: Tokenizer) -> list[int]:
        """Return the begin mark and the ids of the prompt."""
        begin, ids = begin_ids(tokenizer), tokenizer.encode(_prompt_text(prompt), allow_special=self.read_special)
        return [*begin, *(ids[len(begin) :] if ids[: len(begin)] == begin else ids)]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the id that ends a text."""
        return (_eos_id(tokenizer),)

    def pair(self, prompt: Content, completion: Content, tokenizer: Tokenizer) -> tuple[list[int], Rendered]:
        """Return the ids of a prompt, and those of its completion with the end of text."""
        before, after = _prompt_text(prompt), _text(completion)
        answer, eos_id = encode_after(before, after, tokenizer, allow_special=self.read_special), _eos_id(tokenizer)
        answer += [eos_id] * (answer[-1:] != [eos_id])
        return self.prompt_ids(prompt, tokenizer), Rendered(answer, [True] * len(answer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatML(ChatTemplate):
    """Each turn between two special tokens: ``<|im_start|>role``, a line break, the content, ``<|im_end|>``.

    The content is always ordinary text: no message can end a turn by writing a special token.

    Args:
        start: Special token before a turn.
        end: Special token after it. May be the tokenizer's end of text.
    """

    start: str = "<|im_start|>"
    end: str = "<|im_end|>"

    def render(self, messages: Sequence[Message], tokenizer: Tokenizer, *, learn_from: int = 0) -> Rendered:
        """Return a conversation as token ids."""
        ids = _Ids(begin_ids(tokenizer))
        start, end = self._special(tokenizer)
        for number, message in enumerate(messages):
            role, said = _role_and_text(message)
            header = f"{role}\n"
            if role == "assistant":
                ids.add([start, *tokenizer.encode(header)])
                learned = is_target(message, number, learn_from)
                ids.add([*encode_after(header, said, tokenizer), end], learned=learned)
            else:
                ids.add([start, *tokenizer.encode(header + said), end])
            ids.add(tokenizer.encode("\n"))
        return ids.rendered

    def prompt_ids(self, prompt: Content, tokenizer: Tokenizer) -> list[int]:
        """Return the turns of a prompt and the beginning of the assistant's."""
        start, _ = self._special(tokenizer)
        return [*self.render(turns_of(prompt, "user"), tokenizer).ids, start, *tokenizer.encode("assistant\n")]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the id that ends a turn, and the one that ends a text."""
        return _distinct(self._special(tokenizer)[1], tokenizer.eos_id)

    def _special(self, tokenizer: Tokenizer) -> tuple[int, int]:
        known = tokenizer.special_tokens
        missing = [token for token in (self.start, self.end) if token not in known]
        if missing:
            raise ConfigurationError(
                f"ChatML needs the special tokens {missing}, and the tokenizer has {list(known)[:8]}. Add them to "
                f'tokenizer and model of a checkpoint: --model.model.new_tokens "[{", ".join(missing)}]". Or train a '
                "tokenizer with them (special_tokens), or name others: ChatML(start=..., end=...)."
            )
        return known[self.start], known[self.end]


def encode_pair(
    prompt: Content, completion: Content, tokenizer: Tokenizer, template: ChatTemplate, max_length: int | None = None
) -> tuple[list[int], list[int], bool]:
    """Return the ids of a prompt, those of a completion to it, and whether the completion was cut.

    The completion ends with the token to stop at, unless it was cut: a cut one must not teach to stop in the middle.

    Args:
        prompt: Text, or turns.
        completion: Text, or turns of which the first is the assistant's.
        tokenizer: Tokenizer of the model.
        template: Writes them.
        max_length: Most ids of both together. The prompt is never cut, so nothing may be left of the completion.

    Raises:
        DataError: If a turn cannot be written.
    """
    prompt_ids, answer = template.pair(prompt, completion, tokenizer)
    room = len(answer.ids) if max_length is None else max(0, max_length - len(prompt_ids))
    return prompt_ids, answer.ids[:room], room < len(answer.ids)


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that a text begins with, once.

    Published tokenizers define them, possibly as none. Models that were trained here have seen each document after an
    end-of-text token.

    Args:
        tokenizer: Tokenizer of the model.
    """
    published: Sequence[int] | None = getattr(tokenizer, "prefix_ids", None)
    if published is not None:
        return list(published)
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


class _Ids:
    """Ids that grow, with their mask."""

    def __init__(self, ids: list[int]) -> None:
        self.rendered = Rendered(list(ids), [False] * len(ids))

    def add(self, ids: Sequence[int], *, learned: bool = False) -> None:
        self.rendered.ids.extend(ids)
        self.rendered.learn_mask.extend([learned] * len(ids))


def _text(content: Content) -> str:
    if not isinstance(content, str):
        raise _no_turns()
    return content


def _prompt_text(prompt: Content) -> str:
    text = _text(prompt)
    return f"{text}\n" if isinstance(text, Instruction) else text


def _no_turns() -> DataError:
    return DataError(
        "Plain() has no way to write turns. Choose a template: --data.template ChatML, or TokenizerTemplate for the "
        "tokenizer's own (template=ChatML() in Python). Or give prompt and completion as text."
    )


def turns_of(content: Content, role: str) -> list[Message]:
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def is_target(message: Message, number: int, learn_from: int) -> bool:
    weight = message.get("weight")
    return number >= learn_from if weight is None else bool(weight)


def _role_and_text(message: Message) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = None if None in parts else "".join(map(str, parts))
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"A message needs a role and a content, both text, got {str(dict(message))[:120]}.")
    return role, content


def encode_after(before: str, text: str, tokenizer: Tokenizer, *, allow_special: bool = False) -> list[int]:
    """Return the ids of a text that follows another, whose own ids stay as they are.

    Some tokenizers mark the beginning of a text; a continuation has no such mark.
    """
    alone = tokenizer.encode(before, allow_special=allow_special)
    both = tokenizer.encode(before + text, allow_special=allow_special)
    if both[: len(alone)] == alone:
        return both[len(alone) :]
    return tokenizer.encode(text, allow_special=allow_special)


def _eos_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise ConfigurationError(
            "The tokenizer has no end-of-text token, so a model could not learn to stop. Give it one (special_tokens, "
            "eos_token), or use a chat template."
        )
    return tokenizer.eos_id


def _distinct(*ids: int | None) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token for token in ids if token is not None))

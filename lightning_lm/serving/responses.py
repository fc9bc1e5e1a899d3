"""Responses of OpenAI's interface: whole ones, and the chunks of a stream."""

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_lm.errors import LightningLMError
from lightning_lm.generation.detokenizer import AnswerText
from lightning_lm.protocols import Tokenizer
from lightning_lm.serving.calls import Call
from lightning_lm.serving.fields import RequestError
from lightning_lm.serving.request import (
    DoesNotFit,
    EngineStopped,
    OutOfMemory,
    QueueFull,
    TimedOut,
    TokenLogprob,
    Update,
)

__all__ = ["Responses", "error_body", "error_status"]

_STATUS = {DoesNotFit: 400, QueueFull: 429, TimedOut: 504, EngineStopped: 503, OutOfMemory: 503}
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_status(error: LightningLMError) -> int:
    """Return the HTTP status of an error.

    Args:
        error: From reading a call or from the engine.
    """
    return error.status if isinstance(error, RequestError) else _STATUS.get(type(error), 500)


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object.

    Args:
        message: Text for people.
        status: HTTP status.
        param: Field of the body.
        code: Short name for programs.
    """
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Places:
    """Places in a text at which its tokens begin; a token within a character begins where that does.

    Args:
        tokenizer: Decodes the tokens.
        before: Ids before the text.
        skipped: Number of tokens that come first and are no part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], skipped: int) -> None:
        self._text, self._skipped, self._length = AnswerText(tokenizer, before), skipped, 0

    def next(self, token: int) -> int:
        """Return where the next token begins."""
        begin = self._length
        if self._skipped:
            self._skipped -= 1
        else:
            self._text.push([token])
            self._length += len(self._text.take())
        return begin


class Responses:
    """The responses to one call.

    Args:
        call: The call.
        tokenizer: That of the model.
        model: Name of the model.
    """

    def __init__(self, call: Call, tokenizer: Tokenizer, model: str) -> None:
        self._call, self._tokenizer = call, tokenizer
        prefix = "chatcmpl" if call.is_chat else "cmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._object = "chat.completion" if call.is_chat else "text_completion"
        self._places: dict[int, _Places] = {}
        self._begun: set[int] = set()

    def whole(self, updates: Sequence[Sequence[Update]]) -> dict[str, Any]:
        """Return the response to a call without streaming.

        Args:
            updates: All updates of each choice.
        """
        choices = [self._choice(index, of_choice) for index, of_choice in enumerate(updates)]
        generated = sum(len(update.token_ids) for of_choice in updates for update in of_choice)
        return {**self._head, "object": self._object, "choices": choices, "usage": self._usage(generated)}

    def chunks(self, index: int, update: Update) -> Iterable[dict[str, Any]]:
        """Yield the chunks of a stream that an update makes; none if it brings nothing to see.

        Args:
            index: Index of the choice.
            update: Its update.
        """
        call, first = self._call, index not in self._begun
        self._begun.add(index)
        if first and call.is_chat:
            yield self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        seen = update.text or update.logprobs or update.prompt_logprobs or update.is_last or (first and call.echo)
        if seen or (call.return_token_ids and update.token_ids):
            choice = self._choice(index, [update], first=first)
            if call.is_chat:
                content = choice.pop("message")["content"]
                choice["delta"] = {"content": content} if content else {}
            yield self._chunk(choice)

    def usage_chunk(self, generated: int) -> dict[str, Any]:
        """Return the last chunk, with the numbers of tokens.

        Args:
            generated: Tokens of all completions.
        """
        return {**self._chunk(None), "usage": self._usage(generated)}

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._call.is_chat else self._object
        return {**self._head, "object": kind, "choices": [] if choice is None else [choice]}

    def _choice(self, index: int, updates: Sequence[Update], *, first: bool = True) -> dict[str, Any]:
        call, last = self._call, updates[-1]
        prompt = index // call.num_choices
        text = "".join(update.text for update in updates)
        if call.echo and first:
            text = call.texts[prompt] + text
        ids = [token for update in updates for token in update.token_ids]
        reason = "length" if last.finish_reason == "length" else "stop" if last.is_last else None
        choice: dict[str, Any] = {
            "index": index,
            "logprobs": self._logprobs(index, updates),
            "finish_reason": reason,
            **({"message": {"role": "assistant", "content": text}} if call.is_chat else {"text": text}),
        }
        if last.finish_reason == "stop":
            choice["stop_reason"] = ids[-1] if ids and ids[-1] in call.ends.ids else None
        if call.return_token_ids:
            choice["token_ids"] = ids
            if first:
                choice["prompt_token_ids"] = list(call.prompts[prompt])
        return choice

    def _logprobs(self, index: int, updates: Sequence[Update]) -> dict[str, Any] | None:
        if self._call.top_logprobs is None:
            return None
        new = [token for update in updates for token in update.logprobs]
        if self._call.is_chat:
            return {"content": [self._chat_logprob(token) for token in new]}
        scored = [token for update in updates for token in update.prompt_logprobs]
        prompt = self._call.prompts[index // self._call.num_choices]
        ids = [*prompt[: len(scored)], *(token.token_id for token in new)]
        return {
            "tokens": [self._token(token) for token in ids],
            "token_logprobs": [None if token is None else token.logprob for token in (*scored, *new)],
            "top_logprobs": [None if token is None else self._top(token) for token in (*scored, *new)],
            "text_offset": self._offsets(index, ids),
        }

    def _offsets(self, index: int, ids: Sequence[int]) -> list[int]:
        """Return where the next tokens of a choice begin in its text."""
        call, prompt = self._call, index // self._call.num_choices
        if index not in self._places:
            added = call.num_added[prompt] if call.echo else 0
            before = call.prompts[prompt][:added] if call.echo else call.prompts[prompt]
            self._places[index] = _Places(self._tokenizer, before, added)
        return [self._places[index].next(token) for token in ids]

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """Return the likeliest tokens by their texts, the token itself among them; of equal texts the likeliest."""
        top: dict[str, float] = {}
        for other, logprob in (*token.top, (token.token_id, token.logprob)):
            top.setdefault(self._token(other), logprob)
        return top

    def _chat_logprob(self, token: TokenLogprob) -> dict[str, Any]:
        return {
            **self._entry(token.token_id, token.logprob),
            "top_logprobs": [self._entry(other, logprob) for other, logprob in token.top],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # else the token is a part of a character
        return {"token": self._token(token), "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    def _token(self, token: int) -> str:
        return f"token_id:{token}" if self._call.tokens_as_ids else self._tokenizer.decode([token])

    def _usage(self, generated: int) -> dict[str, int]:
        read = sum(map(len, self._call.prompts))
        return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}

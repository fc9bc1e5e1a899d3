"""A judge: asks a model for verdicts, keeps every reply, counts what it costs, and asks again for a malformed one."""

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from lightning_lm.errors import ConfigurationError, RemoteError
from lightning_lm.evals.judges.chats import Chat, ChatModel, Reply
from lightning_lm.evals.response_cache import ResponseCache, request_key

__all__ = ["Judge", "Judgement", "Prices", "Usage", "price_text"]

V = TypeVar("V")
_TRIAL = 16
"""Conversations that are asked first: if none of them has a verdict, the others are not paid for."""


@dataclasses.dataclass(frozen=True)
class Prices:
    """Prices of a model's tokens.

    Args:
        prompt: Price of a million tokens of prompts, in any currency.
        completion: Price of a million tokens of replies.
    """

    prompt: float
    completion: float


@dataclasses.dataclass
class Usage:
    """Cost of the replies that a result rests on.

    Args:
        replies: Replies, of this run and of earlier ones.
        cached: Replies among them that an earlier run had asked for.
        prompt_tokens: Tokens of the prompts of all replies.
        completion_tokens: Tokens of all replies.
        new_prompt_tokens: Tokens of the prompts of this run alone.
        new_completion_tokens: Tokens of the replies of this run alone.
    """

    replies: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    new_prompt_tokens: int = 0
    new_completion_tokens: int = 0

    def add(self, reply: Reply, *, cached: bool) -> None:
        """Count a reply.

        Args:
            reply: The reply.
            cached: True if it was not asked for in this run.
        """
        self.replies += 1
        self.cached += cached
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        if not cached:
            self.new_prompt_tokens += reply.prompt_tokens
            self.new_completion_tokens += reply.completion_tokens

    def cost(self, prices: Prices) -> tuple[float, float]:
        """Return the price of all replies, and of those of this run.

        Args:
            prices: Prices of a million tokens.
        """
        every = self.prompt_tokens * prices.prompt + self.completion_tokens * prices.completion
        new = self.new_prompt_tokens * prices.prompt + self.new_completion_tokens * prices.completion
        return every / 1e6, new / 1e6


@dataclasses.dataclass(frozen=True)
class Judgement(Generic[V]):
    """Result of one conversation with a judge.

    Args:
        verdict: The verdict; ``None`` if there is none.
        reply: Its last reply.
        failure: Reason why there is no verdict, or nothing.
        attempts: Replies that it took.
    """

    verdict: V | None
    reply: str
    failure: str = ""
    attempts: int = 1


class Judge:
    """A model that gives verdicts.

    Args:
        model: The model.
        cache: Replies of earlier runs; each new one is added at once, so a run that breaks off goes on there.
        retries: Further attempts at a verdict that was malformed, by a reminder of its form.
        advance: Called with the number of further questions that are done with, for progress bars; from any thread.

    Attributes:
        usage: Cost of the replies so far.

    Raises:
        ConfigurationError: If the number of retries is negative.
    """

    def __init__(
        self,
        model: ChatModel,
        cache: ResponseCache | None = None,
        *,
        retries: int = 1,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        if retries < 0:
            raise ConfigurationError(f"retries={retries} must be at least 0.")
        self.model, self.cache, self.retries = model, cache, retries
        self.usage = Usage()
        self.advance = advance or (lambda _: None)
        self._lock = threading.Lock()

    def ask(self, chats: Sequence[Chat], read: Callable[[str], V | None], reminder: str) -> list[Judgement[V]]:
        """Return the judgement of each conversation.

        Args:
            chats: Conversations that end with the question to the judge.
            read: Returns the verdict of a reply, or ``None``.
            reminder: Message after a reply without a verdict.

        Raises:
            RemoteError: If the judge breaks off, or none of its first replies has a verdict.
        """
        found: list[Judgement[V]] = []
        for start, end in ((0, _TRIAL), (_TRIAL, len(chats))):
            block = chats[start:end]
            if not block:
                continue
            found += self._judged(block, read, reminder)
            if not start and all(one.verdict is None for one in found):
                one = found[0]
                raise RemoteError(
                    f"The judge gave no verdict to any of its first {len(found)} questions. "
                    f"{one.failure or 'no verdict'} The reply to the first: {one.reply[-300:]!r}. Take a model that "
                    "follows the form, give it more tokens (max_tokens), or write a template that it follows."
                )
        return found

    def _judged(self, chats: Sequence[Chat], read: Callable[[str], V | None], reminder: str) -> list[Judgement[V]]:
        found: dict[int, Judgement[V]] = {}
        asked = {index: list(chat) for index, chat in enumerate(chats)}
        for attempt in range(self.retries + 1):
            replies = self.replies([asked[index] for index in asked], is_first=attempt == 0)
            again: dict[int, list[Any]] = {}
            for index, reply in zip(asked, replies, strict=True):
                verdict = None if reply.is_truncated or reply.refusal else read(reply.text)
                failure = "" if verdict is not None else reply.refusal or _failure(reply)
                found[index] = Judgement(verdict, reply.text, failure, attempt + 1)
                if verdict is None and not reply.refusal and attempt < self.retries:
                    said = {"role": "assistant", "content": reply.text.strip() or "(nothing)"}
                    again[index] = [*asked[index], said, {"role": "user", "content": reminder}]
            asked = again
            if not asked:
                break
        return [found[index] for index in range(len(chats))]

    def replies(self, chats: Sequence[Chat], *, is_first: bool = True) -> list[Reply]:
        """Return the reply to each conversation, from the cache if it is there.

        Args:
            chats: The conversations.
            is_first: False for further attempts at questions that progress has counted.

        Raises:
            RemoteError: If the model breaks off.
        """
        description = self.model.description
        keys = [request_key(description, [dict(turn) for turn in chat]) for chat in chats]
        found: dict[str, Reply] = {}
        for key in dict.fromkeys(keys):
            known = None if self.cache is None else self.cache.get(key)
            if known is not None:
                found[key] = Reply(**known)
                self.usage.add(found[key], cached=True)
        wanted = {key: chat for key, chat in zip(keys, chats, strict=True) if key not in found}
        names, advance = list(wanted), self.advance if is_first else (lambda _: None)
        advance(len(chats) - len(names))

        def keep(index: int, reply: Reply) -> None:
            with self._lock:
                found[names[index]] = reply
                self.usage.add(reply, cached=False)
            if self.cache is not None and not reply.refusal:
                self.cache.put(names[index], dataclasses.asdict(reply))
            advance(1)

        if wanted:
            try:
                self.model.reply(list(wanted.values()), keep)
            except RemoteError as error:
                if self.cache is not None:
                    kept = f"{len(self.cache):,} replies are kept in {self.cache.path}"
                    error.add_note(f"{kept}; the same command goes on from there.")
                raise
        return [found[key] for key in keys]


def _failure(reply: Reply) -> str:
    if reply.is_truncated:
        return (
            f"The reply was cut after {reply.completion_tokens} tokens." if reply.completion_tokens else "It was cut."
        )
    return "The last line of the reply is no verdict."


def price_text(usage: Usage, prices: Prices | None) -> str:
    """Return the cost of a result as a line of text.

    Args:
        usage: Replies and tokens.
        prices: Prices of a million tokens; ``None`` if they are not known.
    """
    text = f"{usage.replies:,} replies ({usage.cached:,} of an earlier run), {usage.prompt_tokens:,} tokens in"
    text += f", {usage.completion_tokens:,} out"
    if prices is None:
        return f"{text}."
    every, new = usage.cost(prices)
    digits = 2 if every >= 1 or not every else 2 - math.floor(math.log10(every))
    return f"{text}, cost {every:.{digits}f} (this run {new:.{digits}f})."

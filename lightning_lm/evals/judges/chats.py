"""Models that reply to conversations: behind a server with OpenAI's chat interface, or in this process."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

from lightning_lm.errors import ConfigurationError, RemoteError
from lightning_lm.evals.local_model import LocalModel
from lightning_lm.evals.requests import Generation, Likelihood, Prompt, Shot
from lightning_lm.generation import Sampling
from lightning_lm.json_http import JSONServer

__all__ = ["Chat", "ChatModel", "Keep", "LikelihoodChat", "LocalChat", "Reply", "ServerChat"]

Chat = Sequence[Mapping[str, str]]
"""Turns with ``role`` and ``content``, the last one the user's."""
_OF_THE_REQUEST = (400, 413, 422)
"""Statuses of a server that refuses one request, not all of them: too long, or against a rule on content."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """Reply to a conversation.

    Args:
        text: The text.
        prompt_tokens: Tokens of the conversation, as the server counts them; 0 if it does not.
        completion_tokens: Tokens of the reply.
        is_truncated: True if the reply hit the limit on tokens.
        refusal: Reason why there is no text, or nothing.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_truncated: bool = False
    refusal: str = ""


Keep = Callable[[int, Reply], None]
"""Called with a conversation's index as soon as its reply is there; from any thread."""


@runtime_checkable
class ChatModel(Protocol):
    """A model that replies to conversations."""

    @property
    def description(self) -> dict[str, Any]:
        """Identity for results and caches: model, address or digest, settings of the reply."""
        ...

    def reply(self, chats: Sequence[Chat], keep: Keep) -> None:
        """Reply to conversations, in any order.

        Raises:
            RemoteError: If the model cannot be asked any more; replies so far were given to ``keep``.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerChat:
    """A model behind a server, asked through ``chat/completions``.

    Args:
        server: Address of the API, its key and time limit.
        model: Name of the model on the server.
        max_tokens: Longest reply. Tokens.
        temperature: Temperature of the reply; 0 is greedy.
        max_requests: Most requests under way at the same time.
        body: Further fields of each request, such as ``seed``; ``None`` for a field leaves it out.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    server: JSONServer
    model: str
    max_tokens: int = 1024
    temperature: float = 0.0
    max_requests: int = 16
    body: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.max_requests < 1:
            raise ConfigurationError(
                f"max_tokens={self.max_tokens} and max_requests={self.max_requests} must be at least 1."
            )

    @property
    def description(self) -> dict[str, Any]:
        """Address, model and settings of the reply."""
        return {"server": self.server.url, **self._settings}

    @property
    def _settings(self) -> dict[str, Any]:
        own = {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}
        return {name: value for name, value in {**own, **self.body}.items() if value is not None}

    def reply(self, chats: Sequence[Chat], keep: Keep) -> None:
        """Reply to conversations, several at a time.

        Args:
            chats: The conversations.
            keep: Called with each reply.

        Raises:
            RemoteError: If the server fails for a reason that is not of one request; nothing more is asked then, and
                replies under way are still waited for.
        """

        def ask(index: int) -> None:
            keep(index, self._ask(chats[index]))

        pool = ThreadPoolExecutor(self.max_requests)
        try:
            for done in [pool.submit(ask, index) for index in range(len(chats))]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, chat: Chat) -> Reply:
        try:
            response = self.server.post(
                "chat/completions", {**self._settings, "messages": [dict(turn) for turn in chat]}
            )
        except RemoteError as error:
            if error.status in _OF_THE_REQUEST:
                return Reply("", refusal=str(error))
            raise
        choices: Any = response.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(choice, dict) or not isinstance(text, str):
            return Reply("", refusal=f"The response has no message with a text: {json.dumps(response)[:300]}")
        return Reply(text, *_usage(response), choice.get("finish_reason") == "length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalChat:
    """A model in this process, with its chat template if it has one.

    Args:
        model: The model.
        max_tokens: Longest reply. Tokens.
        sampling: Sampling settings of the reply.
    """

    model: LocalModel
    max_tokens: int = 512
    sampling: Sampling = Sampling(temperature=0)

    @property
    def description(self) -> dict[str, Any]:
        """Model, tokenizer and settings of the reply."""
        sampling = {name: value for name, value in dataclasses.asdict(self.sampling).items() if value is not None}
        return {**self.model.description, "max_tokens": self.max_tokens, "sampling": sampling}

    def reply(self, chats: Sequence[Chat], keep: Keep) -> None:
        """Reply to conversations in batches of similar length.

        A conversation that does not fit into the context is refused: cut on its left, the judge would not see the task.

        Args:
            chats: The conversations.
            keep: Called with each reply.
        """
        requests = [Generation(_prompt(chat), max_new_tokens=self.max_tokens, sampling=self.sampling) for chat in chats]
        rows = [self.model.encoder.prompt(request.prompt, self.max_tokens) for request in requests]
        fitting = []
        for index, row in enumerate(rows):
            if row.is_truncated or row.dropped_shots:
                most = self.model.encoder.max_length
                keep(index, Reply("", refusal=f"The conversation and a reply do not fit into {most} tokens."))
            else:
                fitting.append(index)
        fitting.sort(key=lambda index: len(rows[index].ids))
        for start in range(0, len(fitting), self.model.batch_size):
            block = fitting[start : start + self.model.batch_size]
            for index, found in zip(block, self.model.generate([requests[index] for index in block]), strict=True):
                tokens = found.num_tokens[0]
                keep(index, Reply(found.texts[0], len(rows[index].ids), tokens, tokens >= self.max_tokens))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodChat:
    """A model in this process that replies with the likeliest of given lines, without reasons.

    Small models rarely write a verdict in its form, and still prefer one of them; nothing is generated.

    Args:
        model: The model.
        options: The lines, such as ``Verdict: A``.
    """

    model: LocalModel
    options: tuple[str, ...]

    @property
    def description(self) -> dict[str, Any]:
        """Model, tokenizer and options."""
        return {**self.model.description, "options": list(self.options)}

    def reply(self, chats: Sequence[Chat], keep: Keep) -> None:
        """Reply to conversations; one that does not fit into the context is refused.

        Args:
            chats: The conversations.
            keep: Called with each reply.
        """
        for start in range(0, len(chats), self.model.batch_size):
            prompts = [_prompt(chat) for chat in chats[start : start + self.model.batch_size]]
            asked = [Likelihood(prompt, f"\n{option}") for prompt in prompts for option in self.options]
            found = self.model.log_likelihoods(asked)
            for place, prompt in enumerate(prompts):
                scores = found[place * len(self.options) : (place + 1) * len(self.options)]
                if any(score.is_truncated or score.dropped_shots for score in scores):
                    most = self.model.encoder.max_length
                    keep(start + place, Reply("", refusal=f"The conversation does not fit into {most} tokens."))
                    continue
                best = max(range(len(scores)), key=lambda index: scores[index].logprob)
                keep(start + place, Reply(self.options[best], len(self.model.encoder.prompt(prompt, 1).ids)))


def _prompt(chat: Chat) -> Prompt:
    """Return a conversation as a prompt: earlier turns are its examples."""
    system = "\n".join(turn["content"] for turn in chat if turn["role"] == "system")
    turns = [turn["content"] for turn in chat if turn["role"] != "system"]
    shots = tuple(Shot(user, answer) for user, answer in zip(turns[:-1:2], turns[1:-1:2], strict=True))
    return Prompt(turns[-1], shots=shots, instructions=system)


def _usage(response: Mapping[str, Any]) -> tuple[int, int]:
    usage: Any = response.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
    return prompt, completion

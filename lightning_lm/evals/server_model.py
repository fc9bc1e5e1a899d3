"""A model behind a server with OpenAI's interface, asked by evaluations.

Likelihoods come from ``/completions`` with ``echo`` and ``logprobs``, which return those of the prompt's own tokens
(our server, vLLM, llama.cpp); completions from there too, or from ``/chat/completions``.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from lightning_lm.errors import ConfigurationError, RemoteError
from lightning_lm.evals.encoding import Encoder, ScoredText
from lightning_lm.evals.requests import Completions, Generation, Likelihood, LogLikelihood, RollingLikelihood
from lightning_lm.evals.response_cache import ResponseCache, request_key
from lightning_lm.json_http import JSONServer
from lightning_lm.protocols import Tokenizer

__all__ = ["CachedServer", "ServerModel"]

_Read = TypeVar("_Read")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedServer(JSONServer):
    """A server whose responses are kept in a file, so that nothing is asked, or paid for, twice.

    Garbage is not kept: a response goes into the file after it was read as what was asked for.

    Args:
        cache: File of JSON lines; made where it does not exist. ``None`` keeps nothing.
    """

    cache: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        responses = None if self.cache is None else ResponseCache(self.cache)
        object.__setattr__(self, "_responses", responses)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the response to a request, from the file if it is there.

        Args:
            path: Below the address, such as ``completions``.
            body: Body of the request.

        Raises:
            RemoteError: As `JSONServer.post`.
        """
        return self.ask(path, body, lambda response: response)

    def ask(self, path: str, body: Mapping[str, Any], read: Callable[[dict[str, Any]], _Read]) -> _Read:
        """Return what a response is read as; it comes from the file if it is there and can be read.

        Args:
            path: Below the address, such as ``completions``.
            body: Body of the request.
            read: Returns what is wanted of a response; raises `RemoteError` if that is not in it.

        Raises:
            RemoteError: As `JSONServer.post`, and of ``read``.
        """
        responses: ResponseCache | None = self.__dict__["_responses"]
        if responses is None:
            return read(super().post(path, body))
        key = request_key(self.url, path, body)
        response: dict[str, Any] | None = responses.get(key)
        if response is not None:
            with contextlib.suppress(RemoteError):  # of garbage that an earlier version has kept
                return read(response)
        response = super().post(path, body)
        found = read(response)
        responses.put(key, response)
        return found


class ServerModel:
    """A model behind a server, under evaluation.

    Args:
        server: Address of the API, such as ``http://localhost:8000/v1``, or a `CachedServer` with key, time limit,
            retries and a file of responses.
        model: Name of the model on the server.
        tokenizer: The model's tokenizer. With it prompts are sent as token ids, cut as for a model in this process;
            without, as text, and the server's ``text_offset`` tells where a continuation begins.
        max_length: Tokens that the model may read; needs the tokenizer.
        chat: Ask for completions by ``/chat/completions``; likelihoods are refused.
        max_requests: Most requests under way at the same time.

    Raises:
        ConfigurationError: If a setting is out of range.
    """

    def __init__(
        self,
        server: str | JSONServer,
        model: str,
        *,
        tokenizer: Tokenizer | None = None,
        max_length: int | None = None,
        chat: bool = False,
        max_requests: int = 16,
    ) -> None:
        if max_requests < 1:
            raise ConfigurationError(f"max_requests={max_requests} lets no request through; give at least 1.")
        if max_length is not None and tokenizer is None:
            raise ConfigurationError("max_length counts tokens and needs the model's tokenizer; give both or none.")
        self._server = server if isinstance(server, JSONServer) else JSONServer(url=server)
        self._model, self._chat, self._max_requests = model, chat, max_requests
        self.tokenizer = tokenizer
        self._encoder = None if tokenizer is None else Encoder(tokenizer, max_length=max_length)

    @property
    def description(self) -> dict[str, str]:
        """Address and name of the model, and how prompts are cut for it."""
        encoder = self._encoder
        cut = {} if encoder is None else {"tokenizer": encoder.tokenizer.fingerprint}
        if encoder is not None and encoder.max_length is not None:
            cut["max_length"] = str(encoder.max_length)
        return {"model": self._model, "server": self._server.url, "chat": str(self._chat), **cut}

    def shown(self, request: Likelihood | RollingLikelihood | Generation) -> str:
        """Return the text that the server is sent for a request.

        Args:
            request: The request.
        """
        if isinstance(request, RollingLikelihood):
            return request.text
        if isinstance(request, Generation):
            return json.dumps(request.prompt.messages, ensure_ascii=False) if self._chat else request.prompt.text
        return request.prompt.text + request.continuation

    def log_likelihoods(self, requests: Sequence[Likelihood | RollingLikelihood]) -> list[LogLikelihood]:
        """Return the score of each request, in their order.

        Args:
            requests: Continuations, and whole texts.

        Raises:
            ConfigurationError: With ``chat``: servers return no likelihoods of turns.
            RemoteError: If the server fails, or sends no log-probabilities of the prompt.
        """
        if self._chat:
            raise ConfigurationError(
                "/chat/completions returns no likelihoods of given texts. Evaluate without chat, or a checkpoint."
            )
        if self._encoder is None:
            return self._map(self._score, requests)
        return self._map(self._score_rows, self._encoder.rows(requests))

    def generate(self, requests: Sequence[Generation]) -> list[Completions]:
        """Return the completions of each request, in their order.

        Args:
            requests: Prompts and settings.

        Raises:
            RemoteError: If the server fails, or its response is no completion.
        """
        return self._map(self._complete, requests)

    def _map(self, work: Callable[[Any], Any], requests: Sequence[Any]) -> list[Any]:
        pool = ThreadPoolExecutor(self._max_requests)
        try:
            return list(pool.map(work, requests))
        finally:  # after a failure nothing more is asked
            pool.shutdown(cancel_futures=True)

    def _score(self, request: Likelihood | RollingLikelihood) -> LogLikelihood:
        if isinstance(request, RollingLikelihood):
            text, context = request.text, ""
        else:
            text, context = request.prompt.text + request.continuation, request.prompt.text.rstrip()
        return self._echo(text, lambda echo: echo.of_characters(len(context), len(text)))

    def _score_rows(self, rows: Sequence[ScoredText]) -> LogLikelihood:
        total = _total([self._echo(row.ids.tolist(), functools.partial(_Echo.of_tokens, row=row)) for row in rows])
        return dataclasses.replace(
            total,
            dropped_shots=max((row.dropped_shots for row in rows), default=0),
            is_truncated=any(row.is_truncated for row in rows),
        )

    def _echo(self, prompt: str | list[int], read: Callable[["_Echo"], LogLikelihood]) -> LogLikelihood:
        body = {"model": self._model, "prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        return self._ask("completions", body, lambda response: read(self._echoed(response)))

    def _echoed(self, response: Mapping[str, Any]) -> "_Echo":
        choice = _choices(response, 1)[0]
        found = choice.get("logprobs")
        if not isinstance(found, dict) or not isinstance(found.get("token_logprobs"), list):
            raise RemoteError(
                f"{self._server.url} sent no log-probabilities of the prompt's tokens, which likelihoods are summed "
                "from. It must support echo with logprobs on /completions; ours does: lightning-lm serve."
            )
        return _Echo(found["token_logprobs"], found.get("top_logprobs"), found.get("text_offset"))

    def _ask(self, path: str, body: Mapping[str, Any], read: Callable[[dict[str, Any]], _Read]) -> _Read:
        if isinstance(self._server, CachedServer):
            return self._server.ask(path, body, read)
        return read(self._server.post(path, body))

    def _complete(self, request: Generation) -> Completions:
        sampling, prompt = request.sampling, request.prompt
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.max_new_tokens,
            "n": request.num_samples,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        if sampling.seed is not None:
            body["seed"] = (sampling.seed + request.key) % 2**31
        dropped, cut = 0, False
        if self._chat and prompt.begun:
            raise ConfigurationError(
                "/chat/completions begins a turn of its own and cannot go on with reasoning that is there. Evaluate "
                "without chat, or a checkpoint."
            )
        if self._chat:
            body["messages"] = prompt.messages
        elif self._encoder is None:
            body["prompt"] = prompt.text
        else:
            row = self._encoder.prompt(prompt, request.max_new_tokens)
            dropped, cut = row.dropped_shots, row.is_truncated
            body["prompt"] = row.ids.tolist()
        path = "chat/completions" if self._chat else "completions"
        found = self._ask(path, body, lambda response: _completions(response, request.num_samples, self._chat))
        return dataclasses.replace(found, dropped_shots=dropped, is_truncated=cut)


@dataclasses.dataclass(frozen=True)
class _Echo:
    """Log-probabilities of the tokens of a prompt, and of one generated token behind them."""

    logprobs: Sequence[Any]
    top: Any
    offsets: Any

    def of_tokens(self, row: ScoredText) -> LogLikelihood:
        """Return the score of the targets of a row of ids."""
        if len(self.logprobs) < len(row.ids):
            raise RemoteError(
                f"The server sent log-probabilities of {len(self.logprobs)} tokens for a prompt of {len(row.ids)}. Is "
                "the tokenizer that of its model?"
            )
        return self._sum(range(len(row.ids) - row.num_targets, len(row.ids)))

    def of_characters(self, first: int, end: int) -> LogLikelihood:
        """Return the score of the tokens that reach into a range of characters; one across its begin counts whole."""
        known = isinstance(self.offsets, list) and all(isinstance(start, int) for start in self.offsets)
        if not known or len(self.offsets) != len(self.logprobs):
            raise RemoteError("The server sent no text_offset. Give the tokenizer of its model: --tokenizer PATH.")
        ends = [*self.offsets[1:], end]
        places = [i for i, start in enumerate(self.offsets) if start < end and ends[i] > first]
        return self._sum([place for place in places if place or self.logprobs[0] is not None])

    def _sum(self, places: Sequence[int]) -> LogLikelihood:
        values = [self.logprobs[place] for place in places]
        if not all(isinstance(value, int | float) and value <= 1e-4 for value in values):
            raise RemoteError(f"The server sent {values!r:.200} as log-probabilities of a continuation.")
        return LogLikelihood(math.fsum(values), len(values), all(self._is_greedy(place) for place in places))

    def _is_greedy(self, place: int) -> bool:
        best = self.top[place] if isinstance(self.top, list) and place < len(self.top) else None
        return isinstance(best, dict) and bool(best) and self.logprobs[place] >= max(best.values())


def _total(scores: Sequence[LogLikelihood]) -> LogLikelihood:
    return LogLikelihood(
        math.fsum(score.logprob for score in scores),
        sum(score.num_tokens for score in scores),
        all(score.is_greedy for score in scores),
    )


def _completions(response: Mapping[str, Any], count: int, chat: bool) -> Completions:
    texts = [_text(choice, chat) for choice in _choices(response, count)]
    usage: Any = response.get("usage")
    spent = usage.get("completion_tokens") if isinstance(usage, dict) else None
    each = round(spent / len(texts)) if isinstance(spent, int) else 0
    return Completions(tuple(texts), (each,) * len(texts))


def _choices(response: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    choices = response.get("choices")
    if not isinstance(choices, list) or len(choices) != count or not all(isinstance(one, dict) for one in choices):
        raise RemoteError(f"The server's response has no {count} choice(s): {json.dumps(response)[:300]}")
    return choices


def _text(choice: Mapping[str, Any], chat: bool) -> str:
    message = choice.get("message") if chat else None
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if not isinstance(text, str):
        raise RemoteError(f"The server's response has a choice without a text: {json.dumps(choice)[:300]}")
    return text

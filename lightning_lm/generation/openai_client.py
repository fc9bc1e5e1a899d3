"""Completions from an inference server (vLLM, SGLang, llama.cpp) through OpenAI's HTTP interface.

Training needs what the server really sampled: its token ids, since the text of a completion may be tokenized otherwise,
and their log-probabilities under the distribution that is trained. What is not exact is refused when log-probabilities
are asked for, and never made up.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lightning_lm.errors import ConfigurationError, RemoteError
from lightning_lm.generation.decoding_loop import FinishReason
from lightning_lm.generation.detokenizer import AnswerText
from lightning_lm.generation.generator import Completion
from lightning_lm.generation.sampling import Sampling
from lightning_lm.json_http import JSONServer
from lightning_lm.protocols import Tokenizer

__all__ = ["HTTPGenerator"]

_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Fields beyond OpenAI's that choose tokens, and the values with which they change nothing."""
_FURTHER = (*_NEUTRAL, "stop_token_ids", "return_token_ids", "return_tokens_as_token_ids")
"""All fields that are sent beyond OpenAI's."""
_MOST_TOKENS_OF_A_TOKEN = 4
"""A text may have other ids than those that were sampled: at worst one for each byte of a character."""
_ROUNDING = 1e-4
"""Largest log-probability that rounding explains, nats."""
_ID_MARK = "token_id:"
"""Spelling of tokens in vLLM's ``logprobs.tokens`` when it is asked for ids instead of texts."""
_MARKED, _LARGEST_ID = re.compile(rf"{_ID_MARK}[0-9]{{1,10}}"), 2**31 - 1


class HTTPGenerator:
    """Completes prompts with the model of an inference server.

    It is called as `lightning_lm.generation.Generator` is. Every prompt is one request, so the server sees all of them
    at once and batches as it likes. Every sampling option is sent, also where it is off: servers have defaults of their
    own, which they read from the model's folder. The user decides which weights the server has loaded; where they are
    not the ones in training, ``RolloutPlan.importance_cap`` corrects for it.

    Tried against the server itself: llama.cpp (xllamacpp 2026.10.11549), with ``--parallel`` at least the number of
    answers to a prompt. vLLM and SGLang are followed as documented. ``transformers serve`` (5.23) takes no ids as
    prompts and sends none, so that no policy can be trained on its completions.

    Args:
        url: Address of the server's API, such as ``http://localhost:8000/v1``, or a `lightning_lm.json_http.JSONServer`
            with its key, time limit and retries.
        model: Name of the model on the server.
        tokenizer: That of the model. Needed for ``Completion.text`` as the trained model would write it, to tell an
            end of sequence from another stop, and where the server sends no ids.
        max_requests: Most requests that are under way at the same time.
        logprobs_at_temperature: True if the server's log-probabilities are those at the sampling temperature. vLLM's
            are those at temperature 1 unless it runs with ``--logprobs-mode processed_logprobs``, llama.cpp's always
            are; SGLang's are at the sampling temperature. At temperature 1 it makes no difference.
        options: Further fields of each request, for options that only this server has.
        openai_fields_only: Send no fields beyond OpenAI's. By default they are sent until a server refuses one of them
            by its name.

    Raises:
        ConfigurationError: If a setting is out of range.
    """

    def __init__(
        self,
        url: str | JSONServer,
        model: str,
        tokenizer: Tokenizer | None = None,
        *,
        max_requests: int = 64,
        logprobs_at_temperature: bool = False,
        options: Mapping[str, Any] | None = None,
        openai_fields_only: bool = False,
    ) -> None:
        if max_requests < 1:
            raise ConfigurationError(f"max_requests={max_requests} lets no request through; give at least 1.")
        self.tokenizer = tokenizer
        self._server = url if isinstance(url, JSONServer) else JSONServer(url=url)
        self._model = model
        self._max_requests = max_requests
        self._logprobs_at_temperature = logprobs_at_temperature
        self._options = dict(options or {})
        self._refused = "openai_fields_only=True leaves out" if openai_fields_only else None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 128,
        stop_ids: Iterable[int] = (),
        stop_strings: Sequence[str] = (),
        num_samples: int = 1,
        logprobs: bool = False,
    ) -> list[Completion]:
        """Return ``num_samples`` completions of each prompt: those of the first prompt, then those of the second, ...

        Args:
            prompts: Token ids, at least one in each.
            sampling: Sampling settings. The same seed gives the same completions as far as the server keeps to it.
            max_new_tokens: Maximum length of a completion, tokens.
            stop_ids: Ids that end a completion, besides those of the server.
            stop_strings: Texts that end a completion.
            num_samples: Completions per prompt.
            logprobs: Return the log-probabilities of the generated tokens; then ids must be exact too.

        Raises:
            ConfigurationError: If a setting cannot work, or the server's log-probabilities would be those of another
                distribution.
            RemoteError: If the server fails, or its response is not what was requested.
        """
        if max_new_tokens < 1 or num_samples < 1:
            raise ConfigurationError(f"{max_new_tokens=} and {num_samples=} must both be at least 1.")
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise ConfigurationError(f"{stop_strings=} must be a list of texts that are not empty.")
        if logprobs:
            self._check_distribution(sampling)
        reader = _Reader(
            self.tokenizer, frozenset(map(int, stop_ids)), tuple(stop_strings), max_new_tokens, exact=logprobs
        )
        body = self._body(sampling, reader) | {"max_tokens": max_new_tokens, "n": num_samples}
        seeds = _seeds(sampling, len(prompts))
        requests = [
            {**body, "prompt": _checked_prompt(prompt, index), **seed}
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        pool = ThreadPoolExecutor(self._max_requests)
        try:
            answers = pool.map(self._post, requests)
            return [
                reader.completion(choice, request["prompt"])
                for request, answer in zip(requests, answers, strict=True)
                for choice in _choices(answer, num_samples)
            ]
        finally:  # after a failure nothing more is asked
            pool.shutdown(cancel_futures=True)

    def _post(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request, again without the fields beyond OpenAI's if the server refuses one of them by name."""
        if self._refused is None:
            try:
                return self._server.post("completions", request)
            except RemoteError as error:
                named = [field for field in _FURTHER if field in str(error)]
                if error.status not in (400, 422) or not named:
                    raise
                self._refused = f"the server ({error.status}: {', '.join(named)}) does not take"
        return self._server.post("completions", self._plain(request, self._refused))

    def _plain(self, request: Mapping[str, Any], refused: str) -> dict[str, Any]:
        """Return a request with OpenAI's fields only.

        Raises:
            ConfigurationError: If the others are needed.
        """
        eos = None if self.tokenizer is None else self.tokenizer.eos_id
        off = {**_NEUTRAL, "stop_token_ids": request["stop_token_ids"] if {*request["stop_token_ids"]} <= {eos} else []}
        needed = [f"{name}={request[name]}" for name, value in off.items() if request[name] != value]
        if needed:
            raise ConfigurationError(
                f"{', '.join(needed)} cannot be sent: {refused} fields beyond OpenAI's. Leave these settings at their "
                "defaults, or use a server that supports them (vLLM, SGLang, llama.cpp)."
            )
        return {name: value for name, value in request.items() if name not in _FURTHER or name in self._options}

    def _body(self, sampling: Sampling, reader: "_Reader") -> dict[str, Any]:
        return {
            "model": self._model,
            "temperature": sampling.temperature,
            "top_k": -1 if sampling.top_k is None else sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "stop": list(reader.stop_strings),
            "stop_token_ids": sorted(reader.end_ids),
            "return_token_ids": True,
            **({"logprobs": 1, "return_tokens_as_token_ids": True} if reader.exact else {}),
            **self._options,
        }

    def _check_distribution(self, sampling: Sampling) -> None:
        """Refuse log-probabilities that would not be those that `Completion` promises."""
        if self._logprobs_at_temperature:
            plain = Sampling(temperature=sampling.temperature, seed=sampling.seed)
            if sampling != plain:
                raise ConfigurationError(
                    f"The server's log-probabilities would be those after the truncation and penalties of {sampling}. "
                    "Set only a temperature, or ask for no log-probabilities."
                )
        elif sampling.temperature not in (0.0, 1.0):
            raise ConfigurationError(
                f"temperature={sampling.temperature} needs log-probabilities at that temperature, and vLLM gives those "
                "at 1. Start it with --logprobs-mode processed_logprobs (SGLang needs nothing) and set "
                "logprobs_at_temperature=True, or sample at temperature 1."
            )


@dataclass(frozen=True)
class _Reader:
    """Converts the choices of a response to completions.

    Args:
        tokenizer: That of the model.
        stop_ids: Ids that end a completion, besides the end of sequence.
        stop_strings: Texts that end a completion.
        max_new_tokens: Maximum length of a completion, tokens.
        exact: True if the completions are trained on: ids must be the sampled ones, with their log-probabilities.
    """

    tokenizer: Tokenizer | None
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    max_new_tokens: int
    exact: bool

    @property
    def eos_id(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.eos_id

    @property
    def end_ids(self) -> frozenset[int]:
        return self.stop_ids if self.eos_id is None else self.stop_ids | {self.eos_id}

    def completion(self, choice: Mapping[str, Any], prompt: Sequence[int]) -> Completion:
        if choice.get("finish_reason") not in ("stop", "length"):
            raise RemoteError(
                f"The server aborted a completion: finish_reason={choice.get('finish_reason')!r}. Look into its log; "
                "it may have run out of memory, or been told to drop requests."
            )
        if choice.get("prompt_token_ids") not in (None, list(prompt)):
            raise RemoteError(
                "The server put ids other than the prompt before the completion; configure it to add no tokens."
            )
        ids = _token_ids(choice)
        if ids is None:
            return self._tokenized_again(choice, prompt)
        self._require_bounded(len(ids), self.max_new_tokens)
        if not self.end_ids.isdisjoint(ids[:-1]):
            raise RemoteError(
                "The server continued after an id that ends a completion; it must respect stop_token_ids."
            )
        completion = self._from_ids(choice, tuple(prompt), ids)
        return replace(completion, logprobs=_logprobs(choice, len(ids))) if self.exact else completion

    def _require_bounded(self, count: int, most: int) -> None:
        if count > most:
            raise RemoteError(
                f"The server sent {count:,} tokens, and was asked for max_tokens={self.max_new_tokens}. It must heed "
                "that field."
            )

    def _from_ids(self, choice: Mapping[str, Any], prompt: tuple[int, ...], ids: tuple[int, ...]) -> Completion:
        last = ids[-1] if ids else None
        ended = last in self.end_ids or (choice["finish_reason"] == "stop" and self._is_mark(choice, last))
        text, stopped = self._text(choice, prompt, ids[:-1] if ended else ids)
        reason: FinishReason = "length"
        if last is not None and last == self.eos_id:
            reason = "eos"
        elif ended or stopped or choice["finish_reason"] == "stop":
            reason = "stop"
        if self.exact and self.tokenizer is not None and reason == "stop" and not (ended or stopped):
            raise RemoteError(
                "The server ended a completion without the id that ends it, which training needs. Let it return that "
                "id too, or name it in stop_ids."
            )
        return Completion(prompt, ids, text, reason)

    def _is_mark(self, choice: Mapping[str, Any], last: int | None) -> bool:
        """Tell whether the server stopped at an id of its own, such as that at the end of a chat turn."""
        special = () if self.tokenizer is None else self.tokenizer.special_tokens.values()
        return last is not None and (last == choice.get("stop_reason") or last in special)

    def _text(self, choice: Mapping[str, Any], prompt: Sequence[int], ids: Sequence[int]) -> tuple[str, bool]:
        """Return the text of a completion, and whether one of the stop strings ended it."""
        if self.tokenizer is None:
            return str(choice.get("text") or ""), False
        vocab_size = self.tokenizer.vocab_size
        if max(ids, default=0) >= vocab_size:
            raise RemoteError(
                f"The server wrote the id {max(ids)}, and the tokenizer has {vocab_size}. Give the model's tokenizer."
            )
        answer = AnswerText(self.tokenizer, prompt, self.stop_strings)
        answer.push(ids)
        answer.finish()
        return answer.text, answer.stopped

    def _tokenized_again(self, choice: Mapping[str, Any], prompt: Sequence[int]) -> Completion:
        text = choice.get("text")
        if self.exact or self.tokenizer is None or not isinstance(text, str):
            raise RemoteError(
                "The server sent no token ids, and the ids of a completion cannot be derived from its text: training "
                "on a "
                "guess would be wrong. Use one that supports return_token_ids (vLLM from 0.10.2, SGLang from July "
                "2026) or llama.cpp. Without log-probabilities and with a tokenizer the text alone is enough."
            )
        plain = choice["finish_reason"] == "stop" and not self.stop_strings and not self.stop_ids
        ends = plain and self.eos_id is not None and choice.get("stop_reason") in (None, self.eos_id)
        ids = (*self.tokenizer.encode(text), *([self.eos_id] if ends and self.eos_id is not None else []))
        self._require_bounded(len(ids), _MOST_TOKENS_OF_A_TOKEN * self.max_new_tokens + 1)
        return Completion(tuple(prompt), ids, text, "eos" if ends else choice["finish_reason"])


def _choices(answer: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """Return the choices of a response in the order of their indices."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise RemoteError(f"The server's response has no list of choices: {str(answer)[:300]}.")
    places = [choice.get("index", 0 if count == 1 else None) for choice in choices]
    if sorted(map(str, places)) != sorted(map(str, range(count))):
        raise RemoteError(
            f"The server was asked for n={count} completions of a prompt and sent {len(choices)}, of the indices "
            f"{places}. It must know the field n; where it does not, repeat the prompts instead."
        )
    return [choice for _, choice in sorted(zip(map(int, places), choices, strict=True), key=lambda pair: pair[0])]


def _token_ids(choice: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the ids that were sampled, or ``None`` if the server does not report them."""
    ids = choice.get("token_ids")
    if ids is None and _content(choice):
        ids = [entry.get("id") for entry in _content(choice)]
    if ids is None:
        tokens = _reported(choice).get("tokens")
        if not isinstance(tokens, list) or not tokens or not all(re.fullmatch(_MARKED, str(token)) for token in tokens):
            return None
        ids = [int(str(token).removeprefix(_ID_MARK)) for token in tokens]
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token <= _LARGEST_ID for token in ids):
        raise RemoteError(f"The server's token_ids must be whole numbers; it sent {str(ids)[:200]}.")
    return tuple(ids)


def _reported(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    logprobs = choice.get("logprobs")
    return logprobs if isinstance(logprobs, dict) else {}


def _content(choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return llama.cpp's entry of each sampled token, with its ``id`` and ``logprob``, as in chats."""
    content = _reported(choice).get("content")
    entries = content if isinstance(content, list) else []
    return entries if all(isinstance(entry, dict) and "id" in entry for entry in entries) else []


def _logprobs(choice: Mapping[str, Any], count: int) -> tuple[float, ...]:
    values = _reported(choice).get("token_logprobs")
    if values is None and _content(choice):
        values = [entry.get("logprob") for entry in _content(choice)]
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)}" if isinstance(values, list) else "none"
        raise RemoteError(
            f"The server must send a log-probability for each of {count} ids; it sent {got}. Training needs them: let "
            "it heed the field logprobs (vLLM: --max-logprobs at least 1), or use a server that does."
        )
    for value in values:
        if type(value) not in (int, float) or not abs(value) < math.inf:
            raise RemoteError(
                f"The server sent a log-probability that is not a finite number: {value!r:.80}. Look for NaN in its "
                "weights, and for truncation in its own defaults (vLLM: --generation-config vllm)."
            )
        if value > _ROUNDING or value < -sys.float_info.max:
            raise RemoteError(
                f"The server sent the log-probability {value!r:.40}, and none is above 0. It may send logits or "
                "probabilities; it must send natural logarithms of probabilities."
            )
    return tuple(min(float(value), 0.0) for value in values)


def _checked_prompt(prompt: Sequence[int] | str, index: int) -> list[int]:
    if isinstance(prompt, str) or not len(prompt):
        raise ConfigurationError(f"Prompt {index} must be token ids, at least one; got {prompt!r}.")
    return [int(token) for token in prompt]


def _seeds(sampling: Sampling, count: int) -> list[dict[str, int]]:
    """Return the field ``seed`` for each prompt; servers increment it for further completions of a prompt."""
    if sampling.greedy:
        return [{}] * count
    seed = int(torch.randint(2**62, ())) if sampling.seed is None else sampling.seed
    streams = (np.random.SeedSequence(seed, spawn_key=(index,)) for index in range(count))
    return [{"seed": int(stream.generate_state(1)[0]) >> 1} for stream in streams]

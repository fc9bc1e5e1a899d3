"""Calls of OpenAI's interface: from the body of a request to prompts, settings and stop conditions."""

import dataclasses
import functools
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from lightning_lm.data.post_training.tokenizer_template import TokenizerTemplate
from lightning_lm.errors import ConfigurationError, LightningLMError
from lightning_lm.generation import Generator, Sampling
from lightning_lm.generation.decoding_loop import StopConditions
from lightning_lm.generation.prompt_checks import stated_context_length
from lightning_lm.models import end_ids, generation_settings
from lightning_lm.protocols import Tokenizer
from lightning_lm.serving.fields import Fields, RequestError, is_ids
from lightning_lm.serving.request import GenerationRequest, Update

__all__ = ["Call", "ModelCalls"]

_MOST_CHOICES, _MOST_TOP = 128, 20
_DEFAULT_COMPLETION, _DEFAULT_CHAT = 16, 2048
"""Tokens of a completion if a request does not say: OpenAI's number, and at most this many for a chat."""
_LARGEST_SEED = 2**63

_IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
)  # fmt: skip
_REFUSED = {
    "tools": "the model's text is returned as it is; write tools into the prompt, and parse the text.",
    "functions": "the model's text is returned as it is; write tools into the prompt, and parse the text.",
    "suffix": "the model continues texts, and fills no gaps.",
    "audio": "the model reads and writes text.",
    "prediction": "leave it out; the completion is the same without.",
    "reasoning_effort": "set max_tokens instead.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A call, checked.

    Args:
        prompts: Token ids of each prompt.
        texts: Text of each prompt, as it was given.
        num_choices: Completions of each prompt.
        sampling: Sampling settings, with a seed.
        ends: Stop conditions.
        stop_strings: Texts that end a completion.
        logit_bias: Numbers that are added to the logits of tokens.
        top_logprobs: Number of likeliest tokens to report; ``None`` for no log-probabilities.
        is_chat: True for a chat completion.
        echo: Return the prompt before the completion.
        stream: Send the text while it grows.
        include_usage: Send the numbers of tokens at the end of a stream.
        return_token_ids: Return the ids of prompts and completions.
        tokens_as_ids: Write tokens as ``token_id:N``.
    """

    prompts: Sequence[tuple[int, ...]]
    texts: Sequence[str]
    num_choices: int
    sampling: Sampling
    ends: StopConditions
    stop_strings: tuple[str, ...]
    logit_bias: dict[int, float]
    top_logprobs: int | None
    is_chat: bool
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    tokens_as_ids: bool = False

    def requests(
        self, deliver: Callable[[int, Update], None], deadline_s: float | None = None
    ) -> list[GenerationRequest]:
        """Return a request to the engine for each choice.

        Args:
            deliver: Gets the index of the choice and its updates.
            deadline_s: See `GenerationRequest`.
        """
        return [
            GenerationRequest(
                prompt_ids=prompt,
                deliver=functools.partial(deliver, index),
                ends=self.ends,
                sampling=self.sampling,
                sample=index,
                stop_strings=self.stop_strings,
                logit_bias=self.logit_bias,
                top_logprobs=self.top_logprobs,
                prompt_logprobs=self.echo and self.top_logprobs is not None,
                deadline_s=deadline_s,
            )
            for index, prompt in enumerate(prompt for prompt in self.prompts for _ in range(self.num_choices))
        ]


class ModelCalls:
    """Reads calls for one model.

    Args:
        model: Language model.
        tokenizer: That of the model.
        name: Name under which it is served.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, name: str) -> None:
        self._tokenizer, self.name = tokenizer, name
        self._begin_ids = Generator(model, tokenizer).begin_ids
        self._end_ids = frozenset(end_ids(generation_settings(model), tokenizer))
        self.context_length = stated_context_length(model)[0]
        """Tokens of prompt and completion together; ``None`` if the model states no limit."""

    @functools.cached_property
    def _turn_ends(self) -> frozenset[int]:
        """Ids that end a turn of the assistant in the chat template."""
        try:
            return frozenset(TokenizerTemplate().stop_ids(self._tokenizer))
        except ConfigurationError:  # it has none: max_tokens ends a completion
            return frozenset()

    @property
    def has_chat_template(self) -> bool:
        """True if the tokenizer writes conversations."""
        return getattr(self._tokenizer, "chat_template", None) is not None

    def chat(self, body: Any) -> Call:
        """Return the call of a body of ``/v1/chat/completions``.

        Raises:
            RequestError: If it cannot be answered.
        """
        fields = Fields(body)
        prompt = self._conversation(fields.pop("messages"))
        longest = fields.integer("max_completion_tokens", None, 1)
        longest = fields.integer("max_tokens", longest, 1)
        wants_logprobs, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, 0, _MOST_TOP)
        if top and not wants_logprobs:
            raise RequestError(f"top_logprobs={top} needs logprobs=true.", param="top_logprobs")
        if longest is None:
            longest = max(1, min(_DEFAULT_CHAT, self._room(prompt) or _DEFAULT_CHAT))
        return self._call(fields, [prompt], [""], longest, top_logprobs=top if wants_logprobs else None, is_chat=True)

    def completion(self, body: Any) -> Call:
        """Return the call of a body of ``/v1/completions``.

        Raises:
            RequestError: If it cannot be answered.
        """
        fields = Fields(body)
        prompts, texts = self._prompts(fields.pop("prompt"))
        echo = fields.flag("echo")
        longest = fields.integer("max_tokens", _DEFAULT_COMPLETION, 0 if echo else 1)
        top = fields.integer("logprobs", None, 0, _MOST_TOP)
        best_of = fields.integer("best_of", None, 1)
        call = self._call(fields, prompts, texts, longest, top_logprobs=top, is_chat=False)
        if best_of not in (None, call.num_choices):
            raise RequestError(
                f"best_of={best_of} must be n={call.num_choices}; ask for n completions and choose.", param="best_of"
            )
        return dataclasses.replace(call, echo=echo)

    def _call(
        self,
        fields: Fields,
        prompts: Sequence[tuple[int, ...]],
        texts: Sequence[str],
        max_new_tokens: int,
        *,
        top_logprobs: int | None,
        is_chat: bool,
    ) -> Call:
        self._require_model(fields.pop("model"))
        vocab_size = self._tokenizer.vocab_size
        count = fields.integer("n", 1, 1, _MOST_CHOICES)
        if len(prompts) * count > _MOST_CHOICES:
            raise RequestError(
                f"{len(prompts)} prompts with n={count} make more than {_MOST_CHOICES} completions; send several "
                "requests.",
                param="prompt",
            )
        self._require_room(prompts, max_new_tokens)
        own_ends = self._end_ids | (self._turn_ends if is_chat else frozenset())
        stop_ids = own_ends | {*fields.ids("stop_token_ids", vocab_size)}
        call = Call(
            prompts=prompts,
            texts=texts,
            num_choices=count,
            sampling=_sampling(fields),
            ends=StopConditions(max_new_tokens, self._tokenizer.eos_id, stop_ids),
            stop_strings=fields.stops(),
            logit_bias=fields.bias(vocab_size),
            top_logprobs=top_logprobs,
            is_chat=is_chat,
            stream=fields.flag("stream"),
            include_usage=_include_usage(fields.pop("stream_options")),
            return_token_ids=fields.flag("return_token_ids"),
            tokens_as_ids=fields.flag("return_tokens_as_token_ids"),
        )
        _require_text(fields.pop("response_format"))
        _require_no_tool(fields.pop("tool_choice"))
        fields.ignore(*_IGNORED)
        fields.refuse(_REFUSED)
        fields.end()
        return call

    def _require_model(self, name: Any) -> None:
        if name not in (None, self.name):
            raise RequestError(
                f"The model {name!r:.80} is not served here; this server has {self.name!r}.",
                param="model",
                status=404,
                code="model_not_found",
            )

    def _conversation(self, messages: Any) -> tuple[int, ...]:
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages must be a list of at least one message.", param="messages")
        if not self.has_chat_template:
            raise RequestError(
                "This model's tokenizer has no chat template, so it knows no conversations. Use /v1/completions, or "
                "train it on conversations first (--data.template ChatML).",
                param="messages",
                code="no_chat_template",
            )
        turns = [_message(message, index) for index, message in enumerate(messages)]
        try:
            return tuple(TokenizerTemplate().prompt_ids(turns, self._tokenizer))
        except LightningLMError as error:
            raise RequestError(f"The conversation cannot be written: {error}", param="messages") from error

    def _prompts(self, prompt: Any) -> tuple[list[tuple[int, ...]], list[str]]:
        """Return the ids and texts of a prompt: a text, ids, or a list of either."""
        vocab_size = self._tokenizer.vocab_size
        given = [prompt] if isinstance(prompt, str) or (prompt and is_ids(prompt, vocab_size)) else prompt
        if not isinstance(given, list) or not given:
            raise RequestError("prompt must be a text, token ids, or a list of either.", param="prompt")
        prompts, texts = [], []
        for item in given:
            if isinstance(item, str):
                prompts.append(self._encode(item))
                texts.append(item)
            elif item and is_ids(item, vocab_size):
                prompts.append(tuple(item))
                texts.append(self._tokenizer.decode(item))
            else:
                raise RequestError(
                    f"prompt contains {item!r:.60}; it must be a text, token ids from 0 to {vocab_size - 1} (at least "
                    "one), or a list of either.",
                    param="prompt",
                )
        return prompts, texts

    def _encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a prompt; special tokens written in it count as such."""
        try:
            ids = self._tokenizer.encode(text, allow_special=True)
        except LightningLMError as error:
            raise RequestError(str(error), param="prompt") from error
        eos_id = self._tokenizer.eos_id
        found = (*self._begin_ids, *ids) or (() if eos_id is None else (eos_id,))
        if not found:
            raise RequestError("prompt is empty, and the tokenizer has no token to begin with.", param="prompt")
        return found

    def _room(self, prompt: Sequence[int]) -> int | None:
        """Return how many tokens fit behind a prompt; the last one is never read."""
        return None if self.context_length is None else self.context_length - len(prompt) + 1

    def _require_room(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        longest = max(prompts, key=len)
        room = self._room(longest)
        if room is not None and room < max_new_tokens:
            remedy = f"Ask for at most {room}, or shorten the prompt." if room > 0 else "Shorten the prompt."
            raise RequestError(
                f"The model has a context of {self.context_length} tokens; the prompt has {len(longest)} and "
                f"max_tokens is {max_new_tokens}. {remedy}",
                param="max_tokens" if room > 0 else "prompt",
                code="context_length_exceeded",
            )


def _sampling(fields: Fields) -> Sampling:
    temperature = fields.number("temperature", 1.0, 0.0, 100.0)
    top_k = fields.integer("top_k", -1, -1)
    seed = fields.integer("seed", None)
    return Sampling(
        temperature=temperature,
        top_k=top_k if top_k > 0 else None,
        top_p=fields.number("top_p", 1.0, 1e-9, 1.0),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 1e-3, 100.0),
        presence_penalty=fields.number("presence_penalty", 0.0, -100.0, 100.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -100.0, 100.0),
        seed=secrets.randbits(62) if seed is None else seed % _LARGEST_SEED,
    )


def _include_usage(options: Any) -> bool:
    if options is None:
        return False
    fields = Fields(options)
    include = fields.flag("include_usage")
    fields.ignore("include_obfuscation", "continuous_usage_stats")
    fields.end()
    return include


def _require_text(response_format: Any) -> None:
    if response_format is not None and response_format != {"type": "text"}:
        raise RequestError(
            f"response_format={response_format!r:.80} is not supported: the text is not constrained, and a promise of "
            'JSON would not be kept. Ask for JSON in the prompt, and check it; {"type": "text"} is accepted.',
            param="response_format",
            code="unsupported",
        )


def _require_no_tool(choice: Any) -> None:
    if choice not in (None, "none", "auto"):
        raise RequestError(
            f"tool_choice={choice!r:.80} is not supported: there are no tools.", param="tool_choice", code="unsupported"
        )


def _message(message: Any, index: int) -> dict[str, Any]:
    """Return a message with its content as one text."""
    param = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"{param} must be an object with role and content.", param=param)
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part["text"] for part in content if isinstance(part.get("text"), str)]
        content = "".join(texts) if len(texts) == len(content) else None
    if not isinstance(content, str):
        raise RequestError(f"{param}.content must be a text, or a list of parts of type text.", param=param)
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": content}

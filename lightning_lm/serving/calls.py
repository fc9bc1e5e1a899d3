"""Calls of OpenAI's interface: from the body of a request to prompts, settings and stop conditions."""

import dataclasses
import functools
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lightning_lm.data.post_training.tokenizer_template import TokenizerTemplate
from lightning_lm.errors import ConfigurationError, LightningLMError
from lightning_lm.generation import Generator, Sampling
from lightning_lm.generation.decoding_loop import StopConditions
from lightning_lm.generation.prompt_checks import stated_context_length
from lightning_lm.models import end_ids, generation_settings
from lightning_lm.protocols import Tokenizer
from lightning_lm.serving.fields import Fields, RequestError, is_ids, shown
from lightning_lm.serving.request import GenerationRequest, Update

__all__ = ["Call", "ModelCalls"]

_MOST_CHOICES, _MOST_TOP = 128, 20
_DEFAULT_COMPLETION, _DEFAULT_CHAT = 16, 2048
"""Tokens of a completion if a request does not say: OpenAI's number, and at most this many for a chat."""
_LARGEST_SEED = 2**63
_UNSTATED_LENGTH = 1 << 17
"""Most tokens of prompt and completion together if the model states no context length."""

_IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "cache_prompt", "parallel_tool_calls", "verbosity", "request_id", "priority",
)  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "function_call": ("none", "auto"),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "add_generation_prompt": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "length_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "typical": (1, 1.0),
    "tfs_z": (1, 1.0),
    "repeat_penalty": (1, 1.0),
}
"""Values of fields that other servers take, with which they do what this server does."""
_OFF = (
    "use_beam_search", "ignore_eos", "min_tokens", "early_stopping", "include_stop_str_in_output",
    "continue_final_message", "mirostat", "chat_template_kwargs", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar", "grammar", "json_schema", "truncate_prompt_tokens", "web_search_options", "thinking",
)  # fmt: skip
"""Fields that other servers take; this one takes them if they are off: empty, false or zero."""
_REFUSED = {
    "response_format": "the text is not constrained, and a promise of JSON would not be kept. Ask for JSON in the "
    'prompt, and check it; {"type": "text"} is accepted.',
    "tool_choice": "there are no tools.",
    "function_call": "there are no tools.",
    "tools": "the model's text is returned as it is; write tools into the prompt, and parse the text.",
    "functions": "the model's text is returned as it is; write tools into the prompt, and parse the text.",
    "suffix": "the model continues texts, and fills no gaps.",
    "audio": "the model reads and writes text.",
    "prediction": "leave it out; the completion is the same without.",
    "reasoning_effort": "set max_tokens instead.",
    "modalities": "the model reads and writes text.",
    **dict.fromkeys(_OFF, "leave it out."),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A call, checked.

    Args:
        prompts: Token ids of each prompt.
        texts: Text of each prompt, as it was given.
        num_added: Number of ids that were put before the text of each prompt.
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
    num_added: Sequence[int]
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


class _Prompt(NamedTuple):
    """A prompt: its ids, its text as it was given, and the number of ids that were put before that."""

    ids: tuple[int, ...]
    text: str = ""
    num_added: int = 0


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
        self._limit = self.context_length or _UNSTATED_LENGTH

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
        count = fields.integer("n", 1, 1, _MOST_CHOICES)
        prompt = self._conversation(fields.pop("messages"))
        longest = fields.integer("max_completion_tokens", None, 1)
        longest = fields.integer("max_tokens", longest, 1)
        wants_logprobs, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, 0, _MOST_TOP)
        if top and not wants_logprobs:
            raise RequestError(f"top_logprobs={top} needs logprobs=true.", param="top_logprobs")
        if longest is None:
            longest = max(1, min(_DEFAULT_CHAT, self._room(prompt)))
        fields.neutral({"echo": (False,), "add_special_tokens": (False,), "best_of": (1,)})
        prompts = [_Prompt(prompt)]
        return self._call(fields, prompts, count, longest, top_logprobs=top if wants_logprobs else None, is_chat=True)

    def completion(self, body: Any) -> Call:
        """Return the call of a body of ``/v1/completions``.

        Raises:
            RequestError: If it cannot be answered.
        """
        fields = Fields(body)
        count = fields.integer("n", 1, 1, _MOST_CHOICES)
        prompts = self._prompts(fields.pop("prompt"), count)
        fields.neutral({"add_special_tokens": (True,)})
        echo = fields.flag("echo")
        longest = fields.integer("max_tokens", _DEFAULT_COMPLETION, 0 if echo else 1)
        top = fields.integer("logprobs", None, 0, _MOST_TOP)
        best_of = fields.integer("best_of", None, 1)
        call = self._call(fields, prompts, count, longest, top_logprobs=top, is_chat=False)
        if best_of not in (None, call.num_choices):
            raise RequestError(
                f"best_of={best_of} must be n={call.num_choices}; ask for n completions and choose.", param="best_of"
            )
        return dataclasses.replace(call, echo=echo)

    def _call(
        self,
        fields: Fields,
        prompts: Sequence["_Prompt"],
        num_choices: int,
        max_new_tokens: int,
        *,
        top_logprobs: int | None,
        is_chat: bool,
    ) -> Call:
        self._require_model(fields.pop("model"))
        vocab_size = self._tokenizer.vocab_size
        self._require_room([prompt.ids for prompt in prompts], max_new_tokens)
        own_ends = self._end_ids | (self._turn_ends if is_chat else frozenset())
        stop_ids = own_ends | {*fields.ids("stop_token_ids", vocab_size)}
        call = Call(
            prompts=[prompt.ids for prompt in prompts],
            texts=[prompt.text for prompt in prompts],
            num_added=[prompt.num_added for prompt in prompts],
            num_choices=num_choices,
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
        fields.neutral(_NEUTRAL)
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

    def _prompts(self, prompt: Any, num_choices: int) -> list["_Prompt"]:
        """Return the prompts of a field: a text, ids, or a list of either."""
        is_one = isinstance(prompt, str) or (prompt and is_ids(prompt, self._tokenizer.vocab_size))
        given = [prompt] if is_one else prompt
        if not isinstance(given, list) or not given:
            raise RequestError("prompt must be a text, token ids, or a list of either.", param="prompt")
        if all(isinstance(item, int) for item in given):  # one of them is no id
            given = [item for item in given if not is_ids([item], self._tokenizer.vocab_size)][:1]
        if len(given) * num_choices > _MOST_CHOICES:
            raise RequestError(
                f"{len(given)} prompts with n={num_choices} make more than {_MOST_CHOICES} completions; send several "
                "requests.",
                param="prompt",
            )
        return [self._prompt(item) for item in given]

    def _prompt(self, item: Any) -> "_Prompt":
        vocab_size = self._tokenizer.vocab_size
        if isinstance(item, str):
            return self._encode(item)
        if item and is_ids(item, vocab_size):
            return _Prompt(tuple(item), self._tokenizer.decode(item))
        raise RequestError(
            f"prompt contains {shown(item)}; it must be a text, token ids from 0 to {vocab_size - 1} (at least one), "
            "or a list of either.",
            param="prompt",
        )

    def _encode(self, text: str) -> "_Prompt":
        """Return the prompt of a text; special tokens written in it count as such."""
        try:
            ids = self._tokenizer.encode(text, allow_special=True)
        except LightningLMError as error:
            raise RequestError(str(error), param="prompt") from error
        eos_id = self._tokenizer.eos_id
        begin = tuple(self._begin_ids) if ids or self._begin_ids or eos_id is None else (eos_id,)
        if not (begin or ids):
            raise RequestError("prompt is empty, and the tokenizer has no token to begin with.", param="prompt")
        return _Prompt((*begin, *ids), text, len(begin))

    def _room(self, prompt: Sequence[int]) -> int:
        """Return how many tokens fit behind a prompt; the last one is never read."""
        return self._limit - len(prompt) + 1

    def _require_room(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        longest = max(prompts, key=len)
        room = self._room(longest)
        if room < max_new_tokens:
            remedy = f"Ask for at most {room}, or shorten the prompt." if room > 0 else "Shorten the prompt."
            whose = "model has" if self.context_length else "model states no context length, and the server allows it"
            raise RequestError(
                f"The {whose} a context of {self._limit} tokens; the prompt has {len(longest)} and "
                f"max_tokens is {shown(max_new_tokens)}. {remedy}",
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

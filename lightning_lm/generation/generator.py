"""Text from a language model: batches of prompts, several completions each, or one completion as a stream."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation.decoding_loop import Batch, Decoder, FinishReason, PlainDecoder, Row, StopConditions
from lightning_lm.generation.detokenizer import AnswerText
from lightning_lm.generation.few_rows import few_rows_products
from lightning_lm.generation.forward import forward_for
from lightning_lm.generation.prompt_checks import check_ids, check_length, spare_positions
from lightning_lm.generation.sampling import Sampler, Sampling
from lightning_lm.generation.speculative import Speculation, SpeculativeDecoder, SpeculativeSampler
from lightning_lm.models import end_ids, generation_settings
from lightning_lm.protocols import Tokenizer

__all__ = ["Completion", "Generator", "any_mark", "begin_mark", "evaluating", "with_seed"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion.

    Args:
        prompt_ids: The ids that it continues, with the mark that a text prompt was given at its front.
        token_ids: The generated ids. The id that ended the completion, and the ids that spelt a stop string, are among
            them: training on the completion needs them.
        text: The generated text, without the end-of-sequence token, and cut before the stop string.
            Empty where there is no tokenizer.
        finish_reason: ``"eos"``: the tokenizer's end of sequence came. ``"stop"``: a stop id or stop string came.
            ``"length"``: ``max_new_tokens`` were generated.
        logprobs: Log-probability of each generated id, in nats, under the model at the sampling temperature (1 for
            greedy decoding) and before penalties and truncation: the policy that is trained in reinforcement learning.
            ``None`` if not asked for.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None


class Generator:
    """Continues prompts with a language model.

    Prompts of different lengths go through the model together, a prompt is read once however many completions it gets,
    and a finished row leaves the batch. Greedy decoding gives a row what it would give it alone; so does sampling.
    The model is in evaluation mode meanwhile, and afterwards each of its modules is in the mode it had.

    Args:
        model: A `lightning_lm.models.Transformer`, anything else with ``make_cache``, or any callable from ids
            [rows, seq] to logits [rows, seq, vocab]; the last is run over the whole text at each step.
        tokenizer: Needed for text prompts, stop strings, streaming and ``Completion.text``. Its ``eos_id`` ends an
            answer, beside those in the model's own `models.generation_settings`, and ids that it does not know are
            never chosen.
        batch_size: Most rows that are decoded together; ``None`` takes all at once. Has no effect on the completions.
        prefix_ids: Put before every text prompt (not before prompts given as ids). ``None`` takes the tokenizer's
            ``prefix_ids`` (what a published tokenizer puts there), or else its ``bos_id``; one that has neither
            attribute gets its ``eos_id``: documents begin with it in training.
        steps_agree: For sharded models, whose ranks must run equally many forward passes: called on every rank
            between two steps with whether this rank has unfinished rows; returns whether any rank has (an all-reduce).
            A rank that is done then runs along on one row. All ranks must call with the same ``max_new_tokens``,
            ``batch_size`` and number of prompts and samples.
        inference_mode: Run under ``torch.inference_mode``, as the Trainer's argument of that name; ``False`` takes
            ``torch.no_grad``, which some sharded or compiled models need. About 5 % slower on a CPU.
        speculation: A small model that guesses ahead, to save passes of the large one.

    Example:
        >>> from lightning_lm.generation import Generator, Sampling
        >>> from lightning_lm.models import Attention, Layer, TransformerConfig
        >>> layers = Layer(mixer=Attention(num_heads=2))
        >>> model = TransformerConfig(vocab_size=10, d_model=8, num_layers=1, layers=layers).build()
        >>> greedy = Sampling(temperature=0)
        >>> (completion,) = Generator(model).generate([[1, 2, 3]], sampling=greedy, max_new_tokens=4)
        >>> len(completion.token_ids), completion.finish_reason
        (4, 'length')
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int | None = None,
        prefix_ids: Sequence[int] | None = None,
        steps_agree: Callable[[bool], bool] | None = None,
        inference_mode: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigurationError(f"batch_size={batch_size} must be at least 1, or None to decode all rows at once.")
        if speculation is not None and steps_agree is not None:
            raise ConfigurationError("With speculation ranks cannot agree on steps; leave one of the two out.")
        self.model = model
        self.tokenizer = tokenizer
        self._batch_size = batch_size
        self._prefix_ids = begin_mark(tokenizer) if prefix_ids is None else list(prefix_ids)
        self._steps_agree = steps_agree
        self._speculation = speculation
        self._without_gradients = torch.inference_mode if inference_mode else torch.no_grad

    @property
    def begin_ids(self) -> list[int]:
        """Ids that are put before every text prompt."""
        return list(self._prefix_ids)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 128,
        stop_ids: Iterable[int] = (),
        stop_strings: Sequence[str] = (),
        num_samples: int = 1,
        logprobs: bool = False,
        keys: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Return ``num_samples`` completions of each prompt: first those of the first, then those of the second.

        Args:
            prompts: Texts, or token ids.
            sampling: Sampling settings.
            max_new_tokens: Most tokens of a completion.
            stop_ids: Ids that end a completion, besides the tokenizer's ``eos_id``.
            stop_strings: Texts that end a completion.
            num_samples: Completions per prompt.
            logprobs: Return the log-probabilities of the generated tokens.
            keys: Number of each prompt that, with the seed, decides its random numbers, at least 0; by default its
                index in the call.

        Raises:
            ConfigurationError: If something is missing (a tokenizer, a prompt), or prompt and answer are longer than
                learned positions reach.
        """
        ends = self._ends(max_new_tokens, stop_ids)
        if num_samples < 1:
            raise ConfigurationError(f"num_samples={num_samples} asks for no completion; give at least 1.")
        prompt_ids = [self._prompt_ids(prompt, index) for index, prompt in enumerate(prompts)]
        self._check(prompt_ids, max_new_tokens)
        rows = [
            Row(
                ids,
                (index, sample),
                self._answer_text(ids, stop_strings) if stop_strings else None,
                (index if keys is None else keys[index], sample),
            )
            for index, ids in enumerate(prompt_ids)
            for sample in range(num_samples)
        ]
        sampling = with_seed(sampling)
        with evaluating(*self._models), few_rows_products(*self._models), self._without_gradients():
            for batch in self._batches(rows):
                for _ in self._batch(batch, sampling, ends, logprobs=logprobs).steps():
                    pass
        return [_completion(row, ends, self.tokenizer, logprobs=logprobs) for row in rows]

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 128,
        stop_ids: Iterable[int] = (),
        stop_strings: Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield the text of one completion as it grows: the same text that `generate` returns for this prompt alone.

        Only whole characters come, and nothing that may turn out to be the begin of a stop string. Between the pieces
        the model stays in evaluation mode; close or exhaust the iterator to restore it.

        Args:
            prompt: A text, or token ids.
            sampling: Sampling settings.
            max_new_tokens: Most tokens of the completion.
            stop_ids: Ids that end it, besides the tokenizer's ``eos_id``.
            stop_strings: Texts that end it.

        Raises:
            ConfigurationError: As `generate`.
        """
        ends = self._ends(max_new_tokens, stop_ids)
        ids = self._prompt_ids(prompt, 0)
        self._check([ids], max_new_tokens)
        text = self._answer_text(ids, stop_strings)
        batch = [Row(ids, (0, 0), text)]
        # As a decorator the mode is left whenever the reader of the stream runs; as a context it would leak to him.
        pieces: Callable[..., Iterator[str]] = self._without_gradients()(self._pieces)
        return pieces(text, batch, with_seed(sampling), ends)

    def _pieces(self, text: AnswerText, rows: list[Row], sampling: Sampling, ends: StopConditions) -> Iterator[str]:
        with evaluating(*self._models), few_rows_products(*self._models):
            for _ in self._batch(rows, sampling, ends).steps():
                if piece := text.take():
                    yield piece
            text.finish()
            if piece := text.take():
                yield piece

    @property
    def _models(self) -> list[Any]:
        return [self.model] if self._speculation is None else [self.model, self._speculation.draft]

    @property
    def _num_ids(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.vocab_size

    def _check(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        for model in self._models:
            check_ids(model, prompts)
            check_length(model, max(map(len, prompts), default=0), max_new_tokens)

    def _batch(self, rows: list[Row], sampling: Sampling, ends: StopConditions, *, logprobs: bool = False) -> Batch:
        return Batch(
            rows,
            decoder=self._decoder(rows, sampling, ends),
            ends=ends,
            logprobs=logprobs,
            num_ids=self._num_ids,
            steps_agree=self._steps_agree,
        )

    def _decoder(self, rows: list[Row], sampling: Sampling, ends: StopConditions) -> Decoder:
        prompts = list({row.key[0]: row.prompt_ids for row in rows}.values())
        keys, most = [row.stream or row.key for row in rows], ends.max_new_tokens
        if self._speculation is None:
            forward = forward_for(self.model, prompts, most, self._steps_agree)
            sampler = Sampler(sampling, [row.prompt_ids for row in rows], keys=keys, max_new_tokens=most)
            return PlainDecoder(forward, sampler, self._num_ids)
        num_tokens = self._speculation.num_tokens
        longest = max(map(len, prompts)) + most - 1
        spare = min(num_tokens, *(spare_positions(model, longest) for model in self._models))
        target, draft = (forward_for(model, prompts, most + spare, most_rewound=num_tokens) for model in self._models)
        return SpeculativeDecoder(
            target,
            draft,
            SpeculativeSampler(sampling, keys=keys, max_new_tokens=most),
            num_tokens=num_tokens,
            spare=spare,
            num_ids=self._num_ids,
        )

    def _batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Cut into batches of rows with prompts of similar length, the longest first: memory runs out early if ever."""
        if self._batch_size is None:
            return iter([rows] if rows else [])
        ordered = sorted(rows, key=lambda row: -len(row.prompt_ids))
        return (list(batch) for batch in _chunks(ordered, self._batch_size))

    def _prompt_ids(self, prompt: str | Sequence[int], index: int) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigurationError("A text prompt needs a tokenizer: Generator(model, tokenizer), or give ids.")
            ids = [*self._prefix_ids, *self.tokenizer.encode(prompt)] or any_mark(self.tokenizer)
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            raise ConfigurationError(
                f"Prompt {index} is empty and there is no token to begin a text with; give at least one token, or "
                "prefix_ids."
            )
        return ids

    def _answer_text(self, prompt_ids: Sequence[int], stop_strings: Sequence[str]) -> AnswerText:
        if self.tokenizer is None:
            raise ConfigurationError("Stop strings and streaming need a tokenizer: Generator(model, tokenizer).")
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise ConfigurationError(f"stop_strings={stop_strings!r} must be a list of texts that are not empty.")
        return AnswerText(self.tokenizer, prompt_ids, stop_strings)

    def _ends(self, max_new_tokens: int, stop_ids: Iterable[int]) -> StopConditions:
        if max_new_tokens < 1:
            raise ConfigurationError(f"max_new_tokens={max_new_tokens} leaves nothing to generate; give at least 1.")
        eos_id = None if self.tokenizer is None else self.tokenizer.eos_id
        own = end_ids(generation_settings(self.model), self.tokenizer)
        return StopConditions(max_new_tokens, eos_id, frozenset([*own, *map(int, stop_ids)]))


def _completion(row: Row, ends: StopConditions, tokenizer: Tokenizer | None, *, logprobs: bool) -> Completion:
    assert row.finish_reason is not None
    answer = row.text
    if answer is None and tokenizer is not None:
        answer = AnswerText(tokenizer, row.prompt_ids)
        answer.push(row.token_ids[:-1] if row.token_ids[-1] in ends.ids else row.token_ids)
    if answer is not None:
        answer.finish()
    return Completion(
        tuple(row.prompt_ids),
        tuple(row.token_ids),
        "" if answer is None else answer.text,
        row.finish_reason,
        tuple(row.logprobs) if logprobs else None,
    )


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Put modules into evaluation mode, and each of their parts back into the mode it had."""
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def begin_mark(tokenizer: Tokenizer | None) -> list[int]:
    """Return the ids that a text begins with: those of a published tokenizer, or else its begin or end of sequence."""
    if tokenizer is None:
        return []
    published: Sequence[int] | None = getattr(tokenizer, "prefix_ids", None)
    if published is not None:
        return list(published)
    mark = getattr(tokenizer, "bos_id", tokenizer.eos_id)
    return [] if mark is None else [mark]


def any_mark(tokenizer: Tokenizer) -> list[int]:
    """Return the ids before an empty text, also for a tokenizer that puts none before other texts."""
    marks = (getattr(tokenizer, "bos_id", None), tokenizer.eos_id)
    return [mark for mark in marks if mark is not None][:1]


def with_seed(sampling: Sampling) -> Sampling:
    """Return settings with a seed; a missing one is drawn from torch's global generator."""
    if sampling.seed is not None or sampling.greedy:
        return sampling
    return dataclasses.replace(sampling, seed=int(torch.randint(2**62, ())))


def _chunks(rows: list[Row], size: int) -> Iterator[tuple[Row, ...]]:
    iterator = iter(rows)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk

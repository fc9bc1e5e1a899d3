"""Completions from the ``generate`` of a ``transformers`` model, with its own caches and kernels."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.functional.logprobs import token_logprobs
from lightning_lm.generation.decoding_loop import FinishReason, StopConditions
from lightning_lm.generation.detokenizer import AnswerText
from lightning_lm.generation.generator import Completion, evaluating, with_seed
from lightning_lm.generation.sampling import Sampling
from lightning_lm.models import TransformersModel, end_ids, generation_settings
from lightning_lm.protocols import Tokenizer

__all__ = ["TransformersGenerator"]


class TransformersGenerator:
    """Continues prompts with the ``generate`` of a ``transformers`` model.

    It is called as `lightning_lm.generation.Generator` is. Its noise is torch's, drawn for a whole batch: the same seed
    gives the same completions only to the same prompts in the same batches. Defaults of the model's own
    ``generation_config`` take no part.

    Args:
        model: A causal language model of ``transformers``, bare or in a `lightning_lm.models.TransformersModel`.
        tokenizer: Its ``eos_id`` ends a completion, ids that it does not know are never chosen, and it makes
            ``Completion.text``.
        batch_size: Most rows that are decoded together; ``None`` takes all at once.
        ranks_agree: Let all ranks run equally many forward passes, which sharded models need.

    Raises:
        ConfigurationError: If the model has no ``generate``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int | None = None,
        ranks_agree: bool = False,
    ) -> None:
        self.model: Any = model.model if isinstance(model, TransformersModel) else model
        if not (hasattr(self.model, "generate") and hasattr(self.model, "generation_config")):
            raise ConfigurationError(
                f"{type(self.model).__name__} has no generate of transformers. Leave the backend out: OwnBackend runs "
                "any model."
            )
        self.tokenizer, self._batch_size, self._ranks_agree = tokenizer, batch_size, ranks_agree

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
        """Return ``num_samples`` completions of each prompt: first those of the first, then those of the second.

        Args:
            prompts: Token ids, at least one in each.
            sampling: Sampling settings; ``generate`` has no presence or frequency penalty.
            max_new_tokens: Most tokens of a completion.
            stop_ids: Ids that end a completion, besides the tokenizer's ``eos_id``.
            stop_strings: Not supported; must be empty.
            num_samples: Completions per prompt.
            logprobs: Return the log-probabilities of the generated tokens.

        Raises:
            ConfigurationError: If a setting cannot work, or cannot be had from ``generate``.
        """
        _check(sampling, stop_strings, logprobs=logprobs)
        if max_new_tokens < 1 or num_samples < 1 or not all(map(len, prompts)):
            raise ConfigurationError(f"{max_new_tokens=} and {num_samples=} must be at least 1, and no prompt empty.")
        eos_id = None if self.tokenizer is None else self.tokenizer.eos_id
        own = end_ids(generation_settings(self.model), self.tokenizer)
        ends = StopConditions(max_new_tokens, eos_id, frozenset([*own, *map(int, stop_ids)]))
        rows = [list(map(int, prompt)) for prompt in prompts for _ in range(num_samples)]
        size = self._batch_size or max(1, len(rows))
        sampling, device = with_seed(sampling), self.model.device
        with evaluating(self.model), torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(sampling.seed or 0)
            return [
                completion
                for first in range(0, len(rows), size)
                for completion in self._batch(rows[first : first + size], sampling, ends, logprobs=logprobs)
            ]

    def _batch(
        self, rows: Sequence[Sequence[int]], sampling: Sampling, ends: StopConditions, *, logprobs: bool
    ) -> Iterator[Completion]:
        width, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        recorder = _Recorder(
            width, None if self.tokenizer is None else self.tokenizer.vocab_size, sampling.temperature or 1.0
        )
        with _own_settings(self.model, sampling, ends):
            sequences = self.model.generate(
                ids, attention_mask=mask, logits_processor=[recorder], synced_gpus=self._ranks_agree
            )
        answers, scores = sequences[:, width:].tolist(), recorder.finish(sequences).tolist()
        for prompt, answer, values in zip(rows, answers, scores, strict=True):
            end = next((place for place, token in enumerate(answer) if token in ends.ids), len(answer) - 1) + 1
            yield self._completion(prompt, answer[:end], values[:end] if logprobs else None, ends)

    def _completion(
        self, prompt: Sequence[int], ids: Sequence[int], logprobs: Sequence[float] | None, ends: StopConditions
    ) -> Completion:
        ended = ids[-1] in ends.ids
        text = ""
        if self.tokenizer is not None:
            answer = AnswerText(self.tokenizer, prompt)
            answer.push(ids[:-1] if ended else ids)
            answer.finish()
            text = answer.text
        reason: FinishReason = "eos" if ids[-1] == ends.eos_id else "stop" if ended else "length"
        return Completion(tuple(prompt), tuple(ids), text, reason, None if logprobs is None else tuple(logprobs))


class _Recorder:
    """A logits processor that notes how likely each chosen id was, and lets no id be chosen that nobody can read.

    Only the logits of one step are held: all of them would be as large as the vocabulary for each token.
    """

    def __init__(self, width: int, num_ids: int | None, temperature: float) -> None:
        self._width, self._num_ids, self._temperature = width, num_ids, temperature
        self._logits: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._note(input_ids)
        self._logits = scores
        if self._num_ids is None or self._num_ids >= scores.shape[-1]:
            return scores.clone()
        return scores.index_fill(-1, torch.arange(self._num_ids, scores.shape[-1], device=scores.device), -torch.inf)

    def finish(self, sequences: Tensor) -> Tensor:
        """Return the log-probability of every generated id, float32 [rows, new]."""
        self._note(sequences)
        return torch.stack(self._columns, dim=1)[:, : sequences.shape[1] - self._width]

    def _note(self, ids: Tensor) -> None:
        if self._logits is not None and len(self._columns) < ids.shape[1] - self._width:
            self._columns.append(token_logprobs(self._logits, ids[:, -1], temperature=self._temperature))


def _check(sampling: Sampling, stop_strings: Sequence[str], *, logprobs: bool) -> None:
    if stop_strings:
        raise ConfigurationError(f"{stop_strings=} would need transformers' tokenizer; use stop_ids.")
    if sampling.presence_penalty or sampling.frequency_penalty:
        raise ConfigurationError(f"transformers has no presence or frequency penalty; set them to 0 in {sampling}.")
    if logprobs and sampling.remembers:
        raise ConfigurationError(
            f"The log-probabilities would be those after the penalties of {sampling}; set repetition_penalty to 1."
        )


@contextmanager
def _own_settings(model: Any, sampling: Sampling, ends: StopConditions) -> Iterator[None]:
    """Replace the model's generation settings, which would fill in missing ones, and restore them afterwards."""
    try:
        from transformers import GenerationConfig
    except ImportError as error:
        raise MissingDependencyError("transformers", "generate with its models", "hf") from error
    fields = {} if sampling.greedy else {name: getattr(sampling, name) for name in ("temperature", "top_p", "min_p")}
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=ends.max_new_tokens,
        do_sample=not sampling.greedy,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=sorted(ends.ids) or None,
        pad_token_id=0,
        **fields,
        **({} if sampling.greedy else {"top_k": sampling.top_k or 0}),
    )
    kept, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = kept

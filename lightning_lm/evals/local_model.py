"""A language model in this process, asked by evaluations: likelihoods and completions.

Likelihoods go through the model in batches of similar length. Few-shot examples that many prompts begin with, and the
prompt that several continuations share, are read once into the key-value cache (`evals.shared_prefixes`); of the logits
only those of target positions are computed.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.evals.encoding import Encoder, ScoredText
from lightning_lm.evals.requests import Completions, Generation, Likelihood, LogLikelihood, RollingLikelihood
from lightning_lm.evals.shared_prefixes import Batch, Stem, plan_batches
from lightning_lm.generation import Generator
from lightning_lm.generation.forward import pass_cost
from lightning_lm.generation.generator import evaluating
from lightning_lm.generation.prompt_checks import check_ids, stated_context_length
from lightning_lm.kernels import linear_target_scores, output_layer
from lightning_lm.models import as_language_model, prompt_is_prefix
from lightning_lm.models.position_bias import PositionBias
from lightning_lm.protocols import Tokenizer, is_language_model

__all__ = ["LocalModel"]


class LocalModel:
    """A `protocols.LanguageModel`, or a causal model of transformers, under evaluation.

    Meanwhile the model is in evaluation mode, and afterwards each of its modules is in the mode it had. Its scores
    depend on the batch size by rounding alone.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        batch_size: Most rows of a forward pass.
        max_length: Tokens that the model may read; by default the context length that it states.
        chat: Write prompts by the tokenizer's chat template.
        description: Entries for the results: checkpoint, digest.
        steps_agree: For sharded models of several ranks, which must run equally many forward passes; see
            `lightning_lm.generation.Generator`. All ranks are asked the same.
        inference_mode: Run under ``torch.inference_mode``; ``False`` takes ``torch.no_grad``.

    Raises:
        ConfigurationError: If the model does not meet the protocol, or there is no chat template to use.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        chat: bool = False,
        description: Mapping[str, str] | None = None,
        steps_agree: Callable[[bool], bool] | None = None,
        inference_mode: bool = True,
    ) -> None:
        self.model: Any = as_language_model(model)
        if not is_language_model(self.model):
            raise ConfigurationError(
                f"{type(model).__name__} has no hidden() and head, which likelihoods are computed from. Give a "
                "lightning_lm.models.Transformer or a causal language model of transformers."
            )
        if batch_size < 1:
            raise ConfigurationError(f"batch_size={batch_size} must be at least 1.")
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.encoder = Encoder(tokenizer, max_length=max_length or stated_context_length(self.model)[0], chat=chat)
        self._description = dict(description or {})
        self._steps_agree, self._inference_mode = steps_agree, inference_mode

    @property
    def description(self) -> dict[str, str]:
        """Class, number of parameters, tokenizer, context, and what was given."""
        return {
            "model": type(getattr(self.model, "model", self.model)).__name__,
            "parameters": str(sum(parameter.numel() for parameter in self.model.parameters())),
            "dtype": str(self.model.head.weight.dtype).removeprefix("torch."),
            "tokenizer": self.tokenizer.fingerprint,
            "max_length": str(self.encoder.max_length),
            "chat": self._template_digest() if self.encoder.chat else "False",
            **self._description,
        }

    def _template_digest(self) -> str:
        template = str(getattr(self.tokenizer, "chat_template", ""))
        return hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()

    def shown(self, request: Likelihood | RollingLikelihood | Generation) -> str:
        """Return the text that the model is given for a request.

        Args:
            request: The request.
        """
        if isinstance(request, RollingLikelihood):
            return request.text
        text = self.encoder.text(request.prompt)
        return text + request.continuation if isinstance(request, Likelihood) else text

    def log_likelihoods(self, requests: Sequence[Likelihood | RollingLikelihood]) -> list[LogLikelihood]:
        """Return the score of each request, in their order; sums are float64.

        Args:
            requests: Continuations, and whole texts.

        Raises:
            DataError: If a continuation is empty, or the model gives NaN.
        """
        texts = self.encoder.rows(requests)
        rows = [row for text in texts for row in text]
        logprobs, greedy = self._score(rows)
        if np.isnan(logprobs).any():
            raise DataError(
                "The model gives NaN for a text of the evaluation: its weights have diverged, or its precision is too "
                "low. Evaluate an earlier checkpoint, or in float32."
            )
        ends = np.cumsum([len(text) for text in texts])
        return [
            LogLikelihood(
                float(logprobs[end - len(text) : end].sum()),
                sum(row.num_targets for row in text),
                bool(greedy[end - len(text) : end].all()),
                max((row.dropped_shots for row in text), default=0),
                any(row.is_truncated for row in text),
            )
            for text, end in zip(texts, ends, strict=True)
        ]

    def generate(self, requests: Sequence[Generation]) -> list[Completions]:
        """Return the completions of each request, in their order.

        Args:
            requests: Prompts and settings; those with the same settings are decoded together.

        Raises:
            ConfigurationError: If a completion leaves no room for its prompt.
        """
        generator = Generator(
            self.model,
            self.tokenizer,
            batch_size=self.batch_size,
            steps_agree=self._steps_agree,
            inference_mode=self._inference_mode,
        )
        groups: dict[Any, list[int]] = {}
        for index, asked in enumerate(requests):
            groups.setdefault((asked.stop, asked.max_new_tokens, asked.num_samples, asked.sampling), []).append(index)
        found: dict[int, Completions] = {}
        for (stop, most, samples, sampling), indices in groups.items():
            prompts = [self.encoder.prompt(requests[index].prompt, most) for index in indices]
            completions = generator.generate(
                [prompt.ids.tolist() for prompt in prompts],
                sampling=sampling,
                max_new_tokens=most,
                stop_strings=stop,
                num_samples=samples,
                keys=[requests[index].key for index in indices],
            )
            for place, (index, prompt) in enumerate(zip(indices, prompts, strict=True)):
                own = completions[place * samples : (place + 1) * samples]
                texts, lengths = tuple(one.text for one in own), tuple(len(one.token_ids) for one in own)
                found[index] = Completions(texts, lengths, prompt.dropped_shots, prompt.is_truncated)
        return [found[index] for index in range(len(requests))]

    def _score(self, rows: list[ScoredText]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the log-probability of each row's targets, and whether all of them were the likeliest tokens."""
        logprobs, greedy = np.zeros(len(rows)), np.ones(len(rows), dtype=bool)
        check_ids(self.model, [row.ids for row in rows])  # type: ignore[misc]
        with self._passes():
            reader = _Reader(self.model, rows)
            batches = plan_batches(
                rows, self.batch_size, sharing=reader.can_share, pass_cost=pass_cost(reader.device.type)
            )
            for batch in batches:
                for found in reader.read(batch):
                    np.add.at(logprobs, found.rows, found.logprobs)
                    np.logical_and.at(greedy, found.rows, found.greedy)
        return logprobs, greedy

    @contextmanager
    def _passes(self) -> Iterator[None]:
        without_gradients = torch.inference_mode if self._inference_mode else torch.no_grad
        with evaluating(self.model), without_gradients():
            yield


class _Found(NamedTuple):
    rows: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    greedy: NDArray[np.bool_]


class _Reader:
    """Forward passes over batches of stems."""

    def __init__(self, model: Any, rows: Sequence[ScoredText]) -> None:
        self._model, self._rows = model, rows
        self.device = model.head.weight.device
        longest = max((len(row.ids) for row in rows), default=1)
        cache = model.make_cache(1, longest) if hasattr(model, "make_cache") else None
        biased = any(isinstance(module, PositionBias) for module in model.modules())
        self._is_prefix = prompt_is_prefix(model)
        joins = cache is not None and cache.can_join and cache.can_rewind
        self.can_share = joins and not biased and not self._is_prefix
        self._trunk: tuple[NDArray[np.uint32], Any] | None = None

    def read(self, batch: Batch) -> Iterator[_Found]:
        """Yield the scores of targets in the stems of a batch, then of those in its leaves."""
        stems = batch.stems
        branching = any(stem.has_leaves for stem in stems) and self.can_share
        cache = self._cache(batch, branching)
        prefixes = [stem.context for stem in stems] if self._is_prefix else None
        hidden = self._hidden([stem.ids[batch.trunk :] for stem in stems], cache, prefixes)
        if batch.is_last:
            self._trunk = None
        yield self._scores(hidden, [target for target in self._stem_targets(batch)])
        if branching:
            yield self._leaves(stems, cache)

    def _cache(self, batch: Batch, branching: bool) -> Any:
        """Return a cache whose rows hold the trunk, with room for stems and leaves; ``None`` if none is needed."""
        if not batch.trunk and not branching:
            return None
        longest = len(batch.stems[0].ids)
        room = max(len(self._rows[row].ids) - len(stem.ids) for stem in batch.stems for row in stem.rows)
        cache = self._model.make_cache(len(batch.stems), longest + room)
        if batch.trunk:
            ids = batch.stems[0].ids[: batch.trunk]
            if self._trunk is None or not np.array_equal(self._trunk[0], ids):
                self._trunk = ids, self._model.make_cache(1, batch.trunk)
                self._hidden([ids], self._trunk[1])
            cache.join([(torch.arange(len(batch.stems), device=self.device), self._trunk[1])], batch.trunk)
        return cache

    def _stem_targets(self, batch: Batch) -> Iterator[tuple[int, int, int, int]]:
        """Yield the target tokens of stems: place of the stem, column that predicts it, id, and row."""
        for place, stem in enumerate(batch.stems):
            for row in stem.rows:
                # Without leaves to read, the token behind the stem is all there is, and with them it is the first.
                for target in range(stem.context, len(stem.ids) + 1):
                    yield place, target - 1 - batch.trunk, int(self._rows[row].ids[target]), row

    def _leaves(self, stems: Sequence[Stem], cache: Any) -> _Found:
        """Read the rest of each row on top of its stem, whose padding is forgotten first."""
        longest = len(stems[0].ids)
        cache.rewind(torch.tensor([longest - len(stem.ids) for stem in stems], device=self.device))
        grown = [
            (place, len(stem.ids), row)
            for place, stem in enumerate(stems)
            for row in stem.rows
            if len(self._rows[row].ids) > len(stem.ids) + 1
        ]
        cache.select(torch.tensor([place for place, _, _ in grown], device=self.device))
        hidden = self._hidden([self._rows[row].ids[start:-1] for _, start, row in grown], cache)
        targets = [
            (place, column, int(target), row)
            for place, (_, start, row) in enumerate(grown)
            for column, target in enumerate(self._rows[row].ids[start + 1 :])
        ]
        return self._scores(hidden, targets)

    def _hidden(self, rows: Sequence[NDArray[np.uint32]], cache: Any, prefixes: Sequence[int] | None = None) -> Tensor:
        """Return the hidden states of rows padded on the right, which no token of a row sees."""
        ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
        lengths = {} if prefixes is None else {"prefix_lengths": torch.tensor(prefixes, device=self.device)}
        hidden: Tensor = self._model.hidden(torch.from_numpy(ids).to(self.device), cache=cache, **lengths)
        return hidden

    def _scores(self, hidden: Tensor, targets: Sequence[tuple[int, int, int, int]]) -> _Found:
        places, columns, ids, rows = np.array(targets, dtype=np.int64).reshape(-1, 4).T
        chosen = hidden[torch.from_numpy(places).to(self.device), torch.from_numpy(columns).to(self.device)]
        wanted = torch.from_numpy(ids).to(self.device)
        logprobs, greedy = linear_target_scores(chosen, targets=wanted, **output_layer(self._model))
        return _Found(rows, logprobs.double().cpu().numpy(), greedy.cpu().numpy())

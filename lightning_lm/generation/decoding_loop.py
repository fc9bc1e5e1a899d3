"""The decoding loop: rows that share the model's forward passes until each one is finished."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.logprobs import token_logprobs
from lightning_lm.generation.detokenizer import AnswerText
from lightning_lm.generation.forward import Forward
from lightning_lm.generation.sampling import Sampler

__all__ = ["NO_TOKEN", "Batch", "Decoder", "FinishReason", "PlainDecoder", "Row", "StopConditions", "Tokens"]

FinishReason = Literal["eos", "stop", "length"]
"""Reason why a completion ended: end of sequence, a stop id or stop string of the user, or the token limit."""

NO_TOKEN = -1
"""Id after the last new token of a row that got fewer of them in a step than another."""


class Tokens(NamedTuple):
    """New tokens of each row, at least one, and the logits that they were chosen from."""

    ids: Tensor
    """int64 [rows, new]; `NO_TOKEN` after the last of a row, and the id ``vocab`` if a row has no valid logit."""
    logits: Tensor
    """[rows, new, vocab]."""


class Decoder(Protocol):
    """Rows that grow by a token at a time, or by those of a draft model that were kept."""

    @property
    def temperature(self) -> float:
        """Divisor of the logits."""
        ...

    def start(self, order: Tensor | None) -> Tokens:
        """Read the prompts; return the first token of each row.

        Args:
            order: Index of the prompt that each row continues, int64 [rows]; by default each row has its own.
        """
        ...

    def advance(self) -> Tokens:
        """Return the next tokens of each row."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 [kept], and drop the others."""
        ...


class PlainDecoder:
    """One pass of the model, and one token of each row, at a time.

    Args:
        forward: Rows of the distinct prompts, one each, in the order of their first occurrence.
        sampler: Sampling state, one row per completion.
        num_ids: Only ids below this number are chosen: a model may have more, to fill up its matrices. ``None`` for
            all.
    """

    def __init__(self, forward: Forward, sampler: Sampler, num_ids: int | None = None) -> None:
        self._forward, self._sampler, self._num_ids = forward, sampler, num_ids
        self._newest = torch.empty(0, dtype=torch.int64)

    @property
    def temperature(self) -> float:
        """Divisor of the logits."""
        return self._sampler.temperature

    def start(self, order: Tensor | None) -> Tokens:
        """Read the prompts; return the first token of each row."""
        logits = self._forward.prefill()
        if order is not None:  # prompts are read once, however many completions they get
            order = order.to(logits.device)
            self._forward.select(order)
            logits = logits[order]
        return self._choose(logits)

    def advance(self) -> Tokens:
        """Return the next token of each row."""
        return self._choose(self._forward.step(self._newest))

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 [kept], and drop the others."""
        self._forward.select(rows)
        self._sampler.select(rows)
        self._newest = self._newest[rows]

    def _choose(self, logits: Tensor) -> Tokens:
        self._newest = self._sampler.choose(logits[:, : self._num_ids])
        return Tokens(self._newest[:, None], logits[:, None])


@dataclasses.dataclass(frozen=True)
class StopConditions:
    """Stop conditions of a completion.

    Args:
        max_new_tokens: Most tokens of a completion.
        eos_id: The tokenizer's end of sequence, if it has one.
        stop_ids: Further ids that end it.
    """

    max_new_tokens: int
    eos_id: int | None
    stop_ids: frozenset[int]

    @functools.cached_property
    def ids(self) -> frozenset[int]:
        """Every id that ends a completion."""
        return self.stop_ids if self.eos_id is None else self.stop_ids | {self.eos_id}


@dataclasses.dataclass
class Row:
    """One completion in the making.

    Args:
        prompt_ids: Ids of the prompt.
        key: Index of the prompt in the call, and of the completion among those to this prompt.
        text: Follows the text, where stop strings or streaming need it while the completion grows.
        stream: Two integers that, with the seed, decide its random numbers; by default the key.
    """

    prompt_ids: Sequence[int]
    key: tuple[int, int]
    text: AnswerText | None = None
    stream: tuple[int, int] | None = None
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, ids: Sequence[int], ends: StopConditions, logprobs: Sequence[float] | None) -> None:
        """Append new tokens, up to the one that ends the completion.

        Args:
            ids: New tokens; `NO_TOKEN` after the last.
            ends: Stop conditions.
            logprobs: Log-probability of each, if they are recorded.
        """
        for place, token in enumerate(ids):
            if token == NO_TOKEN or self.finish_reason is not None:
                return
            self.token_ids.append(token)
            if logprobs is not None:
                self.logprobs.append(logprobs[place])
            if token in ends.ids:
                self.finish_reason = "eos" if token == ends.eos_id else "stop"
            elif self.text is not None:
                self.text.push([token])
                self.finish_reason = "stop" if self.text.stopped else None
            if self.finish_reason is None and len(self.token_ids) == ends.max_new_tokens:
                self.finish_reason = "length"


class Batch:
    """Rows that are decoded together; a finished one leaves, so that it costs nothing more.

    The tokens of a step reach the host in one transfer.

    Args:
        rows: The completions to write; they are filled in.
        decoder: Has one row per completion once it has started.
        ends: Stop conditions of a completion.
        logprobs: Record the log-probability of each token.
        num_ids: Ids at and above this number are none; ``None`` if the model decides.
        steps_agree: See `lightning_lm.generation.Generator`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        decoder: Decoder,
        ends: StopConditions,
        logprobs: bool = False,
        num_ids: int | None = None,
        steps_agree: Callable[[bool], bool] | None = None,
    ) -> None:
        self._rows = list(rows)
        self._decoder = decoder
        self._ends = ends
        self._wants_logprobs = logprobs
        self._num_ids = num_ids
        self._steps_agree = steps_agree

    def steps(self) -> Iterator[None]:
        """Decode; yields after each step, when the rows' texts have grown. Exhaust it to have all rows filled in."""
        tokens = self._decoder.start(self._order())
        for remaining in reversed(range(self._ends.max_new_tokens)):
            self._record(tokens)
            yield
            if remaining == 0 or not self._continues():
                return
            tokens = self._decoder.advance()

    def _order(self) -> Tensor | None:
        """Return the index of the prompt of each row; ``None`` if no two rows have the same one."""
        prompts = {key: index for index, key in enumerate(dict.fromkeys(row.key[0] for row in self._rows))}
        if len(prompts) == len(self._rows):
            return None
        return torch.tensor([prompts[row.key[0]] for row in self._rows])

    def _record(self, tokens: Tokens) -> None:
        """Hand the new tokens to their rows; let those go that have ended."""
        if not self._rows:
            return
        ids, logits = tokens
        columns = ids.tolist()
        if max(map(max, columns)) >= logits[..., : self._num_ids].shape[-1]:
            raise ConfigurationError(
                "The model gave a row of logits that are all NaN or -inf, from which no token can be chosen. Look for "
                "NaN in its weights, or for numbers beyond the range of its data type."
            )
        logprobs: list[list[float]] | list[None] = [None] * len(columns)
        if self._wants_logprobs:
            flat = token_logprobs(
                logits.flatten(0, 1), ids.clamp(min=0).flatten(), temperature=self._decoder.temperature
            )
            logprobs = flat.view_as(ids).tolist()
        for row, new, of_new in zip(self._rows, columns, logprobs, strict=True):
            row.take(new, self._ends, of_new)
        alive = [index for index, row in enumerate(self._rows) if row.finish_reason is None]
        if len(alive) < len(self._rows):
            self._rows = [self._rows[index] for index in alive]
            # If none is left, the first stays as ballast for the steps of other ranks.
            self._decoder.select(torch.tensor(alive or [0], device=ids.device))

    def _continues(self) -> bool:
        unfinished = bool(self._rows)
        return unfinished if self._steps_agree is None else self._steps_agree(unfinished)

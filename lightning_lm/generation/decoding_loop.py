"""The decoding loop: rows that share the model's forward passes until each one is finished."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.logprobs import token_logprobs
from lightning_lm.generation.detokenizer import AnswerText
from lightning_lm.generation.forward import Forward

__all__ = ["Batch", "Chooser", "Ends", "FinishReason", "Row"]

FinishReason = Literal["eos", "stop", "length"]
"""Reason why a completion ended: end of sequence, a stop id or stop string of the user, or the token limit."""


class Chooser(Protocol):
    """Choice of the next token of each row: `lightning_lm.generation.sampling.Sampler`, or one with a draft model."""

    @property
    def temperature(self) -> float:
        """Divisor of the logits."""
        ...

    def choose(self, logits: Tensor) -> Tensor:
        """Return the next token of each row, int64 [rows]; the id ``vocab`` for a row without a valid logit."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 [kept], and drop the others."""
        ...


@dataclasses.dataclass(frozen=True)
class Ends:
    """Stop conditions of a completion.

    Args:
        max_new_tokens: Most tokens of a completion.
        eos_id: The tokenizer's end of sequence, if it has one.
        stop_ids: Further ids that end it.
    """

    max_new_tokens: int
    eos_id: int | None
    stop_ids: frozenset[int]

    @property
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
    """

    prompt_ids: Sequence[int]
    key: tuple[int, int]
    text: AnswerText | None = None
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None


class Batch:
    """Rows that are decoded together; a finished one leaves, so that it costs nothing more.

    The tokens of a step reach the host in one transfer. Rows are looked at one by one only in steps in which one ends,
    or where their text is followed.

    Args:
        rows: The completions to write; they are filled in.
        forward: Rows of the distinct prompts, one each, in the order of their first occurrence.
        sampler: Sampling state, one row per completion.
        ends: Stop conditions of a completion.
        logprobs: Record the log-probability of each token.
        num_ids: Only ids below this number are chosen: a model may have more, to fill up its matrices. ``None`` for
            all.
        steps_agree: See `lightning_lm.generation.Generator`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        forward: Forward,
        sampler: Chooser,
        ends: Ends,
        logprobs: bool = False,
        num_ids: int | None = None,
        steps_agree: Callable[[bool], bool] | None = None,
    ) -> None:
        self._rows = list(rows)
        self._forward = forward
        self._sampler = sampler
        self._ends = ends
        self._end_ids = ends.ids
        self._wants_logprobs = logprobs
        self._num_ids = num_ids
        self._steps_agree = steps_agree
        self._follows_text = any(row.text is not None for row in rows)
        self._id_columns: list[list[int]] = []
        self._logprob_columns: list[Tensor] = []

    def steps(self) -> Iterator[None]:
        """Decode; yields after each step, when the rows' texts have grown. Exhaust it to have all rows filled in."""
        logits = self._expand(self._forward.prefill())
        for remaining in reversed(range(self._ends.max_new_tokens)):
            ids = self._record(self._sampler.choose(logits[:, : self._num_ids]), logits)
            yield
            if remaining == 0 or not self._continues():
                break
            logits = self._forward.step(ids)
        self._flush()
        for row in self._rows:
            row.finish_reason = "length"

    def _expand(self, logits: Tensor) -> Tensor:
        """Go from one row per prompt to one row per completion; the prompt was read only once."""
        prompts = list(dict.fromkeys(row.key[0] for row in self._rows))
        if len(prompts) == len(self._rows):
            return logits
        order = torch.tensor([prompts.index(row.key[0]) for row in self._rows], device=logits.device)
        self._forward.select(order)
        return logits[order]

    def _record(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Store the new column; return the indices of the unfinished rows."""
        if not self._rows:
            return ids
        column = ids.tolist()
        if max(column) >= logits[:, : self._num_ids].shape[-1]:
            raise ConfigurationError(
                "The model gave a row of logits that are all NaN or -inf, from which no token can be chosen. Look for "
                "NaN in its weights, or for numbers beyond the range of its data type."
            )
        self._id_columns.append(column)
        if self._wants_logprobs:
            self._logprob_columns.append(token_logprobs(logits, ids, temperature=self._sampler.temperature))
        if not self._follows_text and self._end_ids.isdisjoint(column):
            return ids
        alive = [i for i, (row, token) in enumerate(zip(self._rows, column, strict=True)) if self._goes_on(row, token)]
        return ids if len(alive) == len(self._rows) else self._leave(alive, ids)

    def _goes_on(self, row: Row, token: int) -> bool:
        if token in self._end_ids:
            row.finish_reason = "eos" if token == self._ends.eos_id else "stop"
        elif row.text is not None:
            row.text.push([token])
            row.finish_reason = "stop" if row.text.stopped else None
        return row.finish_reason is None

    def _leave(self, alive: Sequence[int], ids: Tensor) -> Tensor:
        """Let the finished rows go; if none is left, the first stays as ballast for the steps of other ranks."""
        self._flush()
        self._rows = [self._rows[i] for i in alive]
        kept = torch.tensor(alive or [0], device=ids.device)
        self._forward.select(kept)
        self._sampler.select(kept)
        return ids[kept]

    def _continues(self) -> bool:
        unfinished = bool(self._rows)
        return unfinished if self._steps_agree is None else self._steps_agree(unfinished)

    def _flush(self) -> None:
        """Hand the stored columns to the rows they belong to."""
        for row, ids in zip(self._rows, zip(*self._id_columns, strict=True), strict=False):
            row.token_ids.extend(ids)
        if self._logprob_columns:
            for row, values in zip(self._rows, torch.stack(self._logprob_columns, dim=1).tolist(), strict=True):
                row.logprobs.extend(values)
        self._id_columns, self._logprob_columns = [], []

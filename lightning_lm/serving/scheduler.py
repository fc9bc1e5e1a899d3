"""The requests that the model computes together: continuous batching, and batches that start together."""

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lm.generation.forward import forward_for
from lightning_lm.generation.prefix_cache import PrefixCache
from lightning_lm.generation.slots import SlotForward
from lightning_lm.protocols import Tokenizer
from lightning_lm.serving.request import DoesNotFit, GenerationRequest, failing
from lightning_lm.serving.running import Running, choose, token_logprobs

__all__ = ["ContinuousBatch", "Scheduler", "StaticBatch"]

_TOKENS_OF_A_PASS = {"cpu": 256, "default": 4096}
"""Tokens of prompts that are read between two decoding steps: more of them delay the rows that are decoded."""


class Scheduler(Protocol):
    """Rows that are decoded together."""

    rows: list[Running]

    def step(self, waiting: "deque[GenerationRequest]") -> None:
        """Let waiting requests in, read prompts, and append a token to each row.

        Args:
            waiting: Requests in the order of their arrival; those that are let in are taken out.
        """
        ...

    def forget(self) -> None:
        """Drop keys and values that were computed with earlier weights; there are no rows."""
        ...

    def reset(self) -> None:
        """Drop all rows and their keys and values, whatever state a failed step has left them in."""
        ...


class ContinuousBatch:
    """Rows join and leave at every step.

    Prompts are read in passes of bounded size between two decoding steps, so that a long prompt does not stop the rows
    that are being decoded. Rows stand in the cache in the order: decoded ones, then at most one whose prompt is partly
    read.

    Args:
        model: Passes `lightning_lm.generation.slots.supports_slots`.
        tokenizer: That of the model.
        max_rows: Most rows of the batch.
        prefix_bytes: Memory for the beginnings of earlier prompts. Bytes; 0 for none.
        cache_bytes: Memory for keys and values of the batch: a request for which it does not suffice waits, and one
            that it could never hold is refused. Bytes.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, *, max_rows: int, prefix_bytes: int, cache_bytes: int) -> None:
        self._tokenizer, self._max_rows, self._cache_bytes = tokenizer, max_rows, cache_bytes
        self._forward = SlotForward(model, max_rows=max_rows, max_bytes=cache_bytes)
        device = model.head.weight.device.type
        self._pass_tokens = _TOKENS_OF_A_PASS.get(device, _TOKENS_OF_A_PASS["default"])
        self.prefixes = PrefixCache(prefix_bytes)
        self.rows: list[Running] = []

    def step(self, waiting: "deque[GenerationRequest]") -> None:
        """Let waiting requests in, read prompts up to the bound, and append a token to each row."""
        self._drop_finished()
        self._read(self._group(waiting))
        self._drop_finished()
        decoded = [row for row in self.rows if row.row.token_ids]
        if decoded:
            for rows, hidden in self._pass(0, decoded, [[row.newest] for row in decoded]):
                with failing(row.request for row in rows):
                    choose(rows, self._forward.logits(hidden[:, 0]), self._tokenizer.vocab_size)
            self._drop_finished()

    def forget(self) -> None:
        """Drop keys and values that were computed with earlier weights."""
        self.prefixes.clear()

    def reset(self) -> None:
        """Drop all rows and their keys and values."""
        self.rows = []
        self._forward.release()

    def _group(self, waiting: "deque[GenerationRequest]") -> list[Running]:
        """Return the rows whose prompts are read next, as far as a pass reaches; all but a lone one to their end.

        Equal beginnings wait for each other, so that the second finds the first in the prefix cache.
        """
        if self.rows and not self.rows[-1].row.token_ids:
            return [self.rows[-1]]
        group: list[Running] = []
        beginnings: set[tuple[int, ...]] = set()
        longest = 0
        while waiting and len(self.rows) < self._max_rows and self._has_room(waiting):
            request = waiting[0]
            is_scored = request.prompt_logprobs  # which takes all of the prompt's hidden states
            beginning = None if is_scored else self.prefixes.first_block(request.prompt_ids)
            blocks = [] if is_scored else self.prefixes.find(request.prompt_ids)
            known = len(blocks) * self.prefixes.block_size
            longest = max(longest, len(request.prompt_ids) - known)
            if group and (
                beginning in beginnings or known != group[0].num_read or (len(group) + 1) * longest > self._pass_tokens
            ):
                break
            if beginning is not None:
                beginnings.add(beginning)
            with failing([waiting.popleft()]):
                group.append(self._admit(request, blocks, known))
        return group

    def _has_room(self, waiting: "deque[GenerationRequest]") -> bool:
        """Return whether the first request fits beside the rows; one that does not fit alone is refused."""
        needed = _num_columns(waiting[0])
        rows = [_num_columns(row.request) for row in self.rows]
        if self._forward.fits(len(rows) + 1, max([needed, *rows])):
            return True
        if not rows:
            waiting.popleft().fail(
                DoesNotFit(
                    f"Prompt and completion of up to {needed:,} tokens need more than the {self._cache_bytes >> 20:,} "
                    "MB for keys and values. Ask for fewer tokens, or start the server with a larger --cache-memory."
                )
            )
        return False

    def _admit(self, request: GenerationRequest, blocks: list[Any], known: int) -> Running:
        row = Running(request, self._tokenizer)
        if known:
            self._forward.restore(len(self.rows), blocks)
        row.num_read = known
        self.rows.append(row)
        return row

    def _pass(
        self, first: int, rows: Sequence[Running], parts: Sequence[Sequence[int]]
    ) -> list[tuple[Sequence[Running], Tensor]]:
        """Append tokens to neighbouring rows; return these rows with their hidden states.

        If the pass over all of them fails, they are computed one by one, and those that fail alone are missing.
        """
        done: list[tuple[Sequence[Running], Tensor]] = []
        with failing([rows[0].request] if len(rows) == 1 else ()):
            done.append((rows, self._forward.read(first, parts)))
        if done or len(rows) == 1:
            return done
        apart = [self._pass(first + place, rows[place : place + 1], [part]) for place, part in enumerate(parts)]
        return [one for passes in apart for one in passes]

    def _read(self, group: Sequence[Running]) -> None:
        """Read on in the prompts of the last rows; choose the first token of those that are read."""
        if not group:
            return
        parts = [row.request.prompt_ids[row.num_read :][: self._pass_tokens] for row in group]
        for rows, hidden in self._pass(len(self.rows) - len(group), group, parts):
            with failing(row.request for row in rows):
                self._take_read(rows, hidden)

    def _take_read(self, rows: Sequence[Running], hidden: Tensor) -> None:
        read, last = [], []
        for row, states in zip(rows, hidden, strict=True):
            width = len(row.request.prompt_ids[row.num_read :][: self._pass_tokens])
            self._score_prompt(row, states[:width])
            row.num_read += width
            if row.num_read == len(row.request.prompt_ids):
                self._store(row)
                read.append(row)
                last.append(states[width - 1])
        if read:
            _begin(read, self._forward.logits(torch.stack(last)), self._tokenizer.vocab_size)

    def _score_prompt(self, row: Running, states: Tensor) -> None:
        if row.request.prompt_logprobs:
            targets = row.request.prompt_ids[row.num_read + 1 :][: len(states)]
            if targets:
                logits = self._forward.logits(states[: len(targets)])
                row.prompt_logprobs += token_logprobs(
                    logits, targets, row.request.top_logprobs or 0, self._tokenizer.vocab_size
                )

    def _store(self, row: Running) -> None:
        if not row.request.prompt_logprobs:
            place = self.rows.index(row)
            self.prefixes.store(row.request.prompt_ids, partial(self._forward.copy_block, place))

    def _drop_finished(self) -> None:
        """Let rows leave; the last decoded ones take their places."""
        if not any(row.is_done for row in self.rows):
            return
        staying = [place for place, row in enumerate(self.rows) if not row.is_done]
        decoded = [place for place in staying if self.rows[place].row.token_ids]
        movers = iter([place for place in decoded if place >= len(decoded)])
        held = set(decoded)
        order = [place if place in held else next(movers) for place in range(len(decoded))]
        order += [place for place in staying if place not in held]
        self.rows = [self.rows[place] for place in order]
        self._forward.keep(order)


class StaticBatch:
    """Rows start together; the next batch starts once all of them have ended. For any model.

    Args:
        model: Whatever `lightning_lm.generation.Generator` takes.
        tokenizer: That of the model.
        max_rows: Most rows of the batch.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, *, max_rows: int) -> None:
        self._model, self._tokenizer, self._max_rows = model, tokenizer, max_rows
        self._forward: Any = None
        self.rows: list[Running] = []

    def step(self, waiting: "deque[GenerationRequest]") -> None:
        """Append a token to each row; start a batch if there is none."""
        self._drop_finished()
        if not self.rows:
            self._start(waiting)
        else:
            device = next(self._model.parameters()).device
            logits = self._forward.step(torch.tensor([row.newest for row in self.rows], device=device))
            choose(self.rows, logits, self._tokenizer.vocab_size)
        self._drop_finished()

    def forget(self) -> None:
        """Nothing outlives a batch."""

    def reset(self) -> None:
        """Drop all rows."""
        self.rows, self._forward = [], None

    def _start(self, waiting: "deque[GenerationRequest]") -> None:
        while waiting and len(self.rows) < self._max_rows:
            with failing([waiting[0]]):
                row = Running(waiting.popleft(), self._tokenizer)
                self._score_prompt(row)
                self.rows.append(row)
        if not self.rows:
            return
        prompts = [row.request.prompt_ids for row in self.rows]
        most = max(row.request.ends.max_new_tokens for row in self.rows)
        self._forward = forward_for(self._model, prompts, max(most, 1))
        _begin(self.rows, self._forward.prefill(), self._tokenizer.vocab_size)

    def _score_prompt(self, row: Running) -> None:
        ids = row.request.prompt_ids
        if row.request.prompt_logprobs and len(ids) > 1:
            device = next(self._model.parameters()).device
            output = self._model(torch.tensor([ids[:-1]], device=device))
            logits = getattr(output, "logits", output)[0]
            row.prompt_logprobs += token_logprobs(
                logits, ids[1:], row.request.top_logprobs or 0, self._tokenizer.vocab_size
            )

    def _drop_finished(self) -> None:
        staying = [place for place, row in enumerate(self.rows) if not row.is_done]
        if len(staying) < len(self.rows):
            self.rows = [self.rows[place] for place in staying]
            if staying:
                device = next(self._model.parameters()).device
                self._forward.select(torch.tensor(staying, device=device))
            else:
                self._forward = None


def _num_columns(request: GenerationRequest) -> int:
    """Return the tokens that the model reads for a request at most; the last new one is never read."""
    return len(request.prompt_ids) + max(request.ends.max_new_tokens - 1, 0)


def _begin(rows: Sequence[Running], logits: Tensor, num_ids: int) -> None:
    """Choose the first tokens; requests that want none have ended."""
    for row in rows:
        if row.request.ends.max_new_tokens == 0:
            with failing([row.request]):
                row.finish_unanswered()
    places = [place for place, row in enumerate(rows) if not row.is_done]
    if places:
        choose([rows[place] for place in places], logits[places], num_ids)

"""Speculative decoding: a small model drafts a few tokens, the large one checks them all in a single pass."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.sampling import draw, verify_draft
from lightning_lm.generation.decoding_loop import NO_TOKEN, Tokens
from lightning_lm.generation.forward import ReversibleForward
from lightning_lm.generation.sampling import Sampling, beside, likeliest, row_uniforms

__all__ = ["DraftLength", "Speculation", "SpeculativeDecoder", "SpeculativeSampler"]

_EXPECTED, _MEMORY = 0.8, 0.97
"""Acceptance rate assumed at first, and the decay of older observations of it."""
_DRAFT_COST, _WIDTH_COST = 0.2, 0.05
"""Cost of a pass of the small model, and of each further token in a pass of the large one: passes of the large one."""
_FEW_ROWS, _MANY_ROWS_COST, _ROW_COST = 8, 0.25, 0.019
"""On a CPU, products over more rows than these are no longer those of `few_rows`: what that and each of them costs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """Let a small model guess ahead.

    The output has exactly the distribution of the large model alone, and is the same text if decoding is greedy.
    Each row of a batch advances by the drafts that it kept itself; but a sampled row is no longer the same in every
    batch. Fewer tokens are drafted if few are kept, and none any more in a batch once drafts do not pay.

    Args:
        draft: A model over the same token ids; anything that `lightning_lm.generation.Generator` takes. It pays if a
            pass of it takes a fifth of the large model's, or less.
        num_tokens: Most tokens that are drafted at a time.
    """

    draft: Any
    num_tokens: int = 4

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ConfigurationError(f"Speculation(num_tokens={self.num_tokens}) drafts nothing; give at least 1.")


class DraftLength:
    """Number of tokens to draft, by how many were kept so far; it depends on the tokens only, never on the clock.

    If each token is kept with probability ``p``, a pass over ``n`` drafted tokens gives ``1 + p + ... + p^n``. The
    latest tries count most.

    Args:
        most: Tokens that are drafted at a time, at most.
        device_type: Kind of the large model's device. A pass of a CPU takes longer the more tokens it reads.
    """

    def __init__(self, most: int, device_type: str = "cuda") -> None:
        self._most, self._device_type = most, device_type
        self._kept, self._tried = 4 * _EXPECTED, 4.0

    def note(self, kept: int, tried: int) -> None:
        """Take a check into account.

        Args:
            kept: Drafted tokens that were kept.
            tried: Those, and the first one of each row that was not kept.
        """
        memory = _MEMORY**tried
        self._kept, self._tried = memory * self._kept + kept, memory * self._tried + tried

    def best(self, rows: int = 1) -> int:
        """Return the number with the most tokens for the time they take; zero if drafting does not pay.

        Args:
            rows: Rows of the batch.
        """
        rate = self._kept / self._tried
        gains = [sum(rate**place for place in range(n + 1)) for n in range(self._most + 1)]
        alone = self._pass_cost(rows)
        costs = [
            self._pass_cost(rows * (n + 1)) / alone + (_DRAFT_COST + _WIDTH_COST) * n for n in range(self._most + 1)
        ]
        return max(range(self._most + 1), key=lambda n: gains[n] / costs[n])

    def _pass_cost(self, tokens: int) -> float:
        more = tokens - _FEW_ROWS
        return 1 + _MANY_ROWS_COST + _ROW_COST * more if more > 0 and self._device_type == "cpu" else 1.0


class SpeculativeSampler:
    """Random numbers of the rows, each at its own place, and the choice of tokens by them.

    Args:
        sampling: The settings; penalties change from token to token and cannot be checked in one pass.
        keys: Two integers per row that, with the seed, decide its random numbers.
        max_new_tokens: Most tokens that will be generated.

    Raises:
        ConfigurationError: If there are penalties.
    """

    def __init__(self, sampling: Sampling, *, keys: Sequence[tuple[int, int]], max_new_tokens: int) -> None:
        if sampling.remembers:
            raise ConfigurationError("Penalties cannot be combined with speculation; leave one of the two out.")
        self._sampling = sampling
        self._uniforms: Tensor = row_uniforms(sampling.seed or 0, keys, 3 * max_new_tokens).unflatten(1, (-1, 3))
        self._chosen = torch.zeros(len(keys), dtype=torch.int64)
        """Tokens of each row so far."""

    @property
    def temperature(self) -> float:
        """Divisor of the logits; 1 in greedy decoding."""
        return self._sampling.temperature or 1.0

    def remaining(self) -> tuple[int, int]:
        """Return how many tokens the furthest row may still get, and how many the last one may."""
        fewest, most = (self._uniforms.shape[1] - self._chosen).aminmax()
        return int(fewest), int(most)

    def note(self, counts: Tensor) -> None:
        """Resume after new tokens, int64 [rows] of them."""
        self._chosen = self._chosen + counts.to(self._chosen.device)

    def draw(self, logits: Tensor, ahead: int) -> Tensor:
        """Return a token of each row for the position ``ahead`` tokens after those it has."""
        if self._sampling.greedy:
            return likeliest(logits)
        return draw(self._sampling.truncate(logits.float()), self._numbers(logits, ahead)[:, 0])

    def verify(self, logits: Tensor, draft_logits: Tensor, ids: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        """Return the tokens for a place after the check, int64 [rows], and which drafted ones were kept."""
        if self._sampling.greedy:
            wanted = likeliest(logits)
            return wanted, wanted == ids
        wanted, guessed_from = (self._sampling.truncate(x.float()) for x in (logits, draft_logits))
        return verify_draft(wanted, guessed_from, ids, self._numbers(logits, ahead)[:, 1:])

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 [kept], and drop the others."""
        self._uniforms = self._uniforms[rows.to(self._uniforms.device)]
        self._chosen = self._chosen[rows.to(self._chosen.device)]

    def _numbers(self, logits: Tensor, ahead: int) -> Tensor:
        """Return the three random numbers of each row for a place; beyond the last place any will do."""
        self._uniforms = beside(logits, self._uniforms)
        place = (self._chosen + ahead).clamp(max=self._uniforms.shape[1] - 1).to(logits.device)
        return self._uniforms[torch.arange(len(place), device=place.device), place]


class SpeculativeDecoder:
    """Both models at work: the small one guesses, the large one checks, and each row keeps its own count.

    Args:
        target: Rows of the large model.
        draft: The same rows of the small one.
        sampler: Draws and checks the tokens.
        num_tokens: Tokens that are drafted at a time, at most.
        spare: Tokens beyond the last one of a row that both models can read.
        num_ids: Only ids below this number are chosen; ``None`` for all.
    """

    def __init__(
        self,
        target: ReversibleForward,
        draft: ReversibleForward,
        sampler: SpeculativeSampler,
        *,
        num_tokens: int,
        spare: int,
        num_ids: int | None = None,
    ) -> None:
        self._target, self._draft, self._sampler = target, draft, sampler
        self._num_ids, self._num_tokens, self._length = num_ids, num_tokens, DraftLength(num_tokens)
        self._spare = spare
        self._unread = torch.empty(0)
        """Ids that the small model has not read, int64 [rows, few]; the last is all that the large one has not."""

    @property
    def temperature(self) -> float:
        """Divisor of the logits."""
        return self._sampler.temperature

    def start(self, order: Tensor | None) -> Tokens:
        """Read the prompts; return the first token of each row."""
        logits, drafts = self._target.prefill(), self._draft.prefill()
        self._length = DraftLength(self._num_tokens, logits.device.type)
        if logits[:, : self._num_ids].shape != drafts[:, : self._num_ids].shape:
            raise ConfigurationError(
                f"The model has {logits.shape[1]} token ids and its draft {drafts.shape[1]}; use a draft model that "
                "shares its tokenizer."
            )
        if order is not None:
            order = order.to(logits.device)
            self._target.select(order)
            self._draft.select(order)
            logits = logits[order]
        ids = self._sampler.draw(logits[:, : self._num_ids], 0)[:, None]
        self._sampler.note(torch.ones(len(ids), dtype=torch.int64))
        self._unread = ids
        return Tokens(ids, logits[:, None])

    def advance(self) -> Tokens:
        """Draft, verify, roll back the rejected tokens; return the new tokens of each row."""
        drafted, draft_logits = self._guess()
        newest = self._unread[:, -1:]
        logits = self._target.extend(torch.cat([newest, *drafted], dim=1))
        ids = self._check(drafted, draft_logits, logits[..., : self._num_ids])
        counts = (ids != NO_TOKEN).sum(dim=1)
        self._sampler.note(counts)
        if not drafted:
            self._unread = torch.cat([self._unread, ids], dim=1) if self._num_tokens else ids
            return Tokens(ids, logits)
        kept = int(counts.sum()) - len(counts)
        self._length.note(kept, kept + int((counts <= len(drafted)).sum()))
        surplus = len(drafted) + 1 - counts
        self._target.rewind(surplus)
        self._draft.rewind(surplus)  # it has not read the last guess: now it lacks the last two tokens of each row
        self._unread = torch.cat([newest, ids], dim=1).gather(1, torch.stack([counts - 1, counts], dim=1))
        return Tokens(ids, logits)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 [kept], and drop the others."""
        self._target.select(rows)
        self._draft.select(rows)
        self._sampler.select(rows)
        self._unread = self._unread[rows]

    def _guess(self) -> tuple[list[Tensor], list[Tensor]]:
        """Draft tokens with the small model; return ids [rows, 1] and logits [rows, vocab] of each."""
        self._num_tokens = self._num_tokens and self._length.best(
            len(self._unread)
        )  # zero is for good: it reads no longer
        fewest, most = self._sampler.remaining()
        drafted: list[Tensor] = []
        all_logits: list[Tensor] = []
        for ahead in range(min(self._num_tokens, most - 1, fewest - 1 + self._spare)):
            logits = self._draft.extend(drafted[-1] if drafted else self._unread)[:, -1, : self._num_ids]
            drafted.append(self._sampler.draw(logits, ahead)[:, None])
            all_logits.append(logits)
        return drafted, all_logits

    def _check(self, drafted: list[Tensor], draft_logits: list[Tensor], logits: Tensor) -> Tensor:
        """Return the tokens of each row: the kept ones, and the one that was resampled or drawn after them."""
        ids = torch.full(logits.shape[:2], NO_TOKEN, device=logits.device)
        alive = torch.ones(len(ids), dtype=torch.bool, device=logits.device)
        for ahead, (guess, guessed_from) in enumerate(zip(drafted, draft_logits, strict=True)):
            checked, kept = self._sampler.verify(logits[:, ahead], guessed_from, guess[:, 0], ahead)
            ids[:, ahead] = torch.where(alive, checked, NO_TOKEN)
            alive = alive & kept
            if not bool(alive.any()):
                return ids
        last = len(drafted)
        ids[:, last] = torch.where(alive, self._sampler.draw(logits[:, last], last), NO_TOKEN)
        return ids

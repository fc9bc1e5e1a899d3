"""Speculative decoding: a small model drafts a few tokens, the large one checks them all in a single pass."""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.sampling import draw, verify_draft
from lightning_lm.generation.forward import ReversibleForward
from lightning_lm.generation.sampling import Sampling, beside, row_uniforms

__all__ = ["DraftLength", "Speculation", "SpeculativeForward", "SpeculativeSampler"]

_EXPECTED, _MEMORY = 0.8, 0.97
"""Acceptance rate assumed at first, and the decay of older observations of it."""
_DRAFT_COST, _WIDTH_COST = 0.2, 0.05
"""Cost of a pass of the small model, and of each further token in a pass of the large one: passes of the large one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """Let a small model guess ahead.

    The output has exactly the distribution of the large model alone, and is the same text if decoding is
    greedy. The rows of a batch advance together, by as many tokens as the least lucky one kept, so small batches gain
    most; and a sampled row is no longer the same in every batch. Fewer tokens are drafted where few are kept, and none
    any more in a batch once drafts do not pay, as with a bad draft or in a large batch.

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
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept, self._tried = 4 * _EXPECTED, 4.0

    def note(self, kept: int, tried: int) -> None:
        """Take a check into account.

        Args:
            kept: Drafted tokens that all rows kept.
            tried: Those, and the one that a row did not keep.
        """
        memory = _MEMORY**tried
        self._kept, self._tried = memory * self._kept + kept, memory * self._tried + tried

    def best(self) -> int:
        """Return the number with the most tokens for the time they take; zero where drafting does not pay."""
        rate = self._kept / self._tried
        gains = [sum(rate**place for place in range(n + 1)) for n in range(self._most + 1)]
        costs = [1.0, *(1 + _DRAFT_COST * (n + 1) + _WIDTH_COST * n for n in range(1, self._most + 1))]
        return max(range(self._most + 1), key=lambda n: gains[n] / costs[n])


class SpeculativeSampler:
    """Random numbers of the rows, and the tokens that were checked but not handed out yet.

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
        self.checked: deque[Tensor] = deque()
        self.chosen = 0
        """Tokens handed out so far."""

    @property
    def temperature(self) -> float:
        """Divisor of the logits; 1 in greedy decoding."""
        return self._sampling.temperature or 1.0

    @property
    def remaining(self) -> int:
        """Tokens that may still be handed out."""
        return int(self._uniforms.shape[1]) - self.chosen

    def choose(self, logits: Tensor) -> Tensor:
        """Return the next token of each row, int64 [rows]."""
        ids = self.checked.popleft() if self.checked else self.draw(logits, 0)
        self.chosen += 1
        return ids

    def draw(self, logits: Tensor, ahead: int) -> Tensor:
        """Return a token of each row for the position ``ahead`` tokens after those handed out."""
        return draw(self._sampling.truncate(logits.float()), self._numbers(logits)[:, self.chosen + ahead, 0])

    def verify(self, logits: Tensor, draft_logits: Tensor, ids: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        """Return the tokens for a place after the check, int64 [rows], and which drafted ones were kept."""
        wanted, guessed_from = (self._sampling.truncate(x.float()) for x in (logits, draft_logits))
        return verify_draft(wanted, guessed_from, ids, self._numbers(logits)[:, self.chosen + ahead, 1:])

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 [kept], and drop the others."""
        self._uniforms = self._uniforms[rows.to(self._uniforms.device)]
        self.checked = deque(ids[rows] for ids in self.checked)

    def _numbers(self, logits: Tensor) -> Tensor:
        self._uniforms = beside(logits, self._uniforms)
        return self._uniforms


class SpeculativeForward:
    """Runs both models so that, seen from outside, logits of the large one come a token at a time.

    Args:
        target: Rows of the large model.
        draft: The same rows of the small one.
        sampler: Draws and checks the tokens.
        num_tokens: Tokens that are drafted at a time, at most.
        num_ids: Only ids below this number are chosen; ``None`` for all.
    """

    def __init__(
        self,
        target: ReversibleForward,
        draft: ReversibleForward,
        sampler: SpeculativeSampler,
        *,
        num_tokens: int,
        num_ids: int | None = None,
    ) -> None:
        self._target, self._draft, self._sampler = target, draft, sampler
        self._num_ids, self._length, self._num_tokens = num_ids, DraftLength(num_tokens), num_tokens
        self._logits: deque[Tensor] = deque()

    def prefill(self) -> Tensor:
        """Read the prompts; return logits [rows, vocab]."""
        logits, drafts = self._target.prefill(), self._draft.prefill()
        if logits[:, : self._num_ids].shape != drafts[:, : self._num_ids].shape:
            raise ConfigurationError(
                f"The model has {logits.shape[1]} token ids and its draft {drafts.shape[1]}; use a draft model that "
                "shares its tokenizer."
            )
        return logits

    def step(self, ids: Tensor) -> Tensor:
        """Append these ids, int64 [rows]; return the next-token logits [rows, vocab]."""
        if self._logits:
            return self._logits.popleft()
        self._num_tokens = self._num_tokens and self._length.best()
        if self._num_tokens == 0:  # for good: the small model has not read the tokens since
            return self._target.step(ids)
        self._speculate(ids)
        return self._logits.popleft()

    def select(self, rows: Tensor) -> None:
        """Keep the rows with these indices, int64; an index may occur several times."""
        self._target.select(rows)
        self._draft.select(rows)
        self._logits = deque(logits[rows] for logits in self._logits)

    def _speculate(self, ids: Tensor) -> None:
        """Draft, verify, and roll back the rejected tokens."""
        drafted, draft_logits = self._guess(ids)
        logits = self._target.extend(torch.stack([ids, *drafted], dim=1))
        count = self._check(drafted, draft_logits, logits)
        self._length.note(count - 1, min(count, len(drafted)))
        surplus = len(drafted) + 1 - count
        if surplus:
            self._target.rewind(surplus)
            self._draft.rewind(surplus)
        self._logits = deque(logits[:, :count].unbind(dim=1))

    def _guess(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Draft tokens with the small model; it reads the last draft too, so that both have read the same tokens."""
        drafted: list[Tensor] = []
        all_logits: list[Tensor] = []
        for ahead in range(min(self._num_tokens, self._sampler.remaining - 1)):
            logits = self._draft.step(drafted[-1] if drafted else ids)[:, : self._num_ids]
            drafted.append(self._sampler.draw(logits, ahead))
            all_logits.append(logits)
        if drafted:
            self._draft.step(drafted[-1])
        return drafted, all_logits

    def _check(self, drafted: list[Tensor], draft_logits: list[Tensor], logits: Tensor) -> int:
        """Queue the tokens that all rows have: the kept ones, and the one that was resampled or drawn after them."""
        for ahead, (ids, guessed_from) in enumerate(zip(drafted, draft_logits, strict=True)):
            wanted = logits[:, ahead, : self._num_ids]
            checked, kept = self._sampler.verify(wanted, guessed_from, ids, ahead)
            self._sampler.checked.append(checked)
            if not bool(kept.all()):
                return ahead + 1
        behind = len(drafted)
        self._sampler.checked.append(self._sampler.draw(logits[:, behind, : self._num_ids], behind))
        return behind + 1

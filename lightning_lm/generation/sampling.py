"""Sampling of the next token: the user's settings, and their effect on the rows of one batch."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.dtypes import accumulation_dtype
from lightning_lm.functional.sampling import (
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_counts,
    penalize_repetition,
    scale_by_temperature,
)
from lightning_lm.parts import Limit, Part

__all__ = ["Sampler", "Sampling", "beside", "likeliest", "row_uniforms"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Part, limits={"presence_penalty": Limit.FINITE, "frequency_penalty": Limit.FINITE}):
    """Settings of sampling from a model's logits.

    The options apply in this order: repetition penalty, presence and frequency penalty, temperature, top-k, top-p,
    min-p. Each is defined in `lightning_lm.functional.sampling`; the defaults change nothing.

    Args:
        temperature: Divisor of the logits; 0 takes the likeliest token (greedy decoding).
        top_k: Keep this many of the likeliest tokens; ``None`` keeps all.
        top_p: Keep the smallest set of likeliest tokens with this probability.
        min_p: Keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: Divisor for the logits of tokens in the prompt or the completion; 1 is off.
        presence_penalty: Subtracted from the logits of tokens that occur in the completion.
        frequency_penalty: Subtracted from the logits of tokens, times their count in the completion.
        seed: At least 0. ``None`` takes a new one from torch's global generator at each call, so that
            ``seed_everything`` decides. Completion ``j`` of prompt ``i`` of a call depends on (seed, i, j) and its
            prompt only, not on the rest of the batch. Ranks that should sample different completions need different
            seeds.

    Raises:
        ConfigurationError: If a value lies outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type is float:  # 0 and 1 are easily written where 0.0 and 1.0 are meant
                object.__setattr__(self, field.name, float(getattr(self, field.name)))
        super().__post_init__()
        _check(0 <= self.temperature < math.inf, "temperature", self.temperature, "at least 0 (0 is greedy)")
        _check(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1, or null to keep all tokens")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1 keeps all tokens)")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (keeps all tokens) to 1")
        penalty = self.repetition_penalty
        _check(0 < penalty < math.inf, "repetition_penalty", penalty, "above 0 (1 is off)")
        _check(self.seed is None or self.seed >= 0, "seed", self.seed, "at least 0, or null for a new one each time")

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def remembers(self) -> bool:
        """True if the choice depends on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def truncate(self, logits: Tensor) -> Tensor:
        """Return logits [batch, vocab] after temperature, top-k, top-p and min-p."""
        logits = scale_by_temperature(logits, self.temperature)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        return keep_min_p(keep_top_p(logits, self.top_p), self.min_p)


class Sampler:
    """`Sampling` at work on the rows of one batch.

    Every row has its own stream of random numbers, so rows may be added or removed without changing the samples of
    another.

    Args:
        sampling: The settings; the seed must be a number.
        prompts: The prompt of each row, for the repetition penalty.
        keys: Two integers per row that, with the seed, decide its random numbers.
        max_new_tokens: Largest number of tokens that will be drawn.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        *,
        keys: Sequence[tuple[int, int]],
        max_new_tokens: int,
    ) -> None:
        self._sampling = sampling
        self._prompts = prompts
        self._history: tuple[Tensor, Tensor] | None = None
        self._uniforms = None if sampling.greedy else row_uniforms(sampling.seed, keys, max_new_tokens)
        self._step = 0

    @property
    def temperature(self) -> float:
        """Divisor of the logits; 1 in greedy decoding."""
        return self._sampling.temperature or 1.0

    def choose(self, logits: Tensor) -> Tensor:
        """Return the next token of each row, int64 [rows]; the id ``vocab`` for a row without a valid logit.

        Args:
            logits: Float [rows, vocab].
        """
        if self._sampling.remembers:
            logits = self._penalize(logits.float())
        ids = self._pick(logits)
        if self._history is not None:
            seen, counts = self._history
            column = ids[:, None].clamp(max=logits.shape[-1] - 1)
            seen.scatter_(1, column, True)
            counts.scatter_add_(1, column, torch.ones_like(column, dtype=counts.dtype))
        self._step += 1
        return ids

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 [kept], and drop the others."""
        if self._history is not None:
            self._history = (self._history[0][rows], self._history[1][rows])
        if self._uniforms is not None:
            self._uniforms = self._uniforms[rows.to(self._uniforms.device)]

    def _pick(self, logits: Tensor) -> Tensor:
        if self._uniforms is None:
            return likeliest(logits)
        self._uniforms = beside(logits, self._uniforms)
        return draw(self._sampling.truncate(logits.float()), self._uniforms[:, self._step])

    def _penalize(self, logits: Tensor) -> Tensor:
        if self._history is None:
            self._history = _prompt_history(self._prompts, logits)
        seen, counts = self._history
        sampling = self._sampling
        if sampling.repetition_penalty != 1:
            logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
        return penalize_counts(logits, counts, presence=sampling.presence_penalty, frequency=sampling.frequency_penalty)


def likeliest(logits: Tensor) -> Tensor:
    """Return the likeliest id of each row, int64 [rows]; the id ``vocab`` for a row without a valid logit.

    Args:
        logits: Float [rows, vocab].
    """
    largest, ids = logits.max(dim=-1)
    return torch.where(largest > -torch.inf, ids, logits.shape[-1])


def _check(valid: bool, name: str, value: object, needed: str) -> None:
    if not valid:
        raise ConfigurationError(f"{name}={value} cannot work; it must be {needed}.")


def row_uniforms(seed: int | None, keys: Sequence[tuple[int, int]], count: int) -> Tensor:
    """Return float64 [rows, count] of [0, 1); a row's numbers depend on the seed and its own key only.

    numpy's Philox is the same on every device and platform, and stays so.

    Args:
        seed: At least 0.
        keys: Two integers per row.
        count: Numbers per row; more of them leave the first ones as they are.
    """
    assert seed is not None, "the seed is fixed before the batches are made"
    streams = (np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)) for key in keys)
    return torch.from_numpy(np.stack([np.random.Generator(stream).random(count) for stream in streams]))


def beside(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Return the random numbers on the device of the logits, in float64 where it has that."""
    if uniforms.device == logits.device:
        return uniforms
    return uniforms.to(logits.device, accumulation_dtype(logits.device))


def _prompt_history(prompts: Sequence[Sequence[int]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mask of the tokens in each row's prompt, bool [rows, vocab], and zero counts of generated ones."""
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, dtype=torch.int64)] = True
    return seen.to(logits.device), torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)

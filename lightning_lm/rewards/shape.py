"""Rewards for the form of an answer: its tags, and its length."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from lightning_lm.errors import ConfigurationError
from lightning_lm.rewards.answers import Reward

__all__ = ["FormatTags", "LengthReward", "OverlongPenalty"]


@dataclass(frozen=True, kw_only=True)
class FormatTags(Reward):
    """1 if the completion is just one block of each tag, in order, with only whitespace between them, else 0.

    Args:
        tags: For ``("think", "answer")``: ``<think>...</think> <answer>...</answer>``.
    """

    tags: tuple[str, ...] = ("think", "answer")

    @override
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        """Check the form of each completion."""
        blocks = (rf"<{tag}>(?:(?!</?{tag}>).)*</{tag}>" for tag in map(re.escape, self.tags))
        pattern = re.compile(r"\s*" + r"\s*".join(blocks) + r"\s*", re.DOTALL)
        return [float(pattern.fullmatch(completion) is not None) for completion in completions]


@dataclass(frozen=True, kw_only=True)
class LengthReward(Reward):
    """1 for a completion of the target length, falling linearly to 0 at zero or twice that length.

    Args:
        target: Target length, characters.
    """

    target: int = field(kw_only=False)

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ConfigurationError(f"target={self.target} must be at least 1 character.")

    @override
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        """Score the length of each completion."""
        return [max(0.0, 1 - abs(len(completion) - self.target) / self.target) for completion in completions]


@dataclass(frozen=True, kw_only=True)
class OverlongPenalty(Reward):
    """0 up to a length, then linearly down to -1 at the longest length allowed, -1 beyond it.

    Args:
        max_tokens: Longest completion allowed, tokens.
        buffer: Tokens before it over which the penalty grows.

    Source:
        Yu et al. 2025 (DAPO), arXiv:2503.14476, equation 13.
    """

    max_tokens: int
    buffer: int

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.max_tokens:
            raise ConfigurationError(f"buffer={self.buffer} must be from 1 to max_tokens={self.max_tokens}.")

    @override
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        """Score the number of tokens of each completion, ``columns["completion_ids"]``."""
        excess = (len(ids) - (self.max_tokens - self.buffer) for ids in columns["completion_ids"])
        return [-min(max(tokens / self.buffer, 0.0), 1.0) for tokens in excess]

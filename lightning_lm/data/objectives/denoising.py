"""Denoising: a text becomes a source to read and a target to write.

Span corruption (T5): random spans are removed, each leaves a sentinel in the source, and the target is the sentinels
with what they stand for. Prefix language modelling: the text is cut in two. UL2 mixes both, with a token in front of
the source that names the kind. Fill-in-the-middle reorders a text, and all of it is target. Everything is a pure
function of the ids and of a generator that seed, row and epoch determine.
"""

import abc
import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_lm.data.objectives.vocabulary import Vocabulary
from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Limit, Part

__all__ = [
    "UL2",
    "Denoiser",
    "Denoisers",
    "Example",
    "FillInTheMiddle",
    "PrefixLM",
    "SpanCorruption",
    "span_counts",
]

Ints = NDArray[np.int64]


class Example(NamedTuple):
    """A source and what is to be written when it was read, both without the end-of-text token."""

    source: Ints
    target: Ints


class Sizes(NamedTuple):
    """Most tokens that a denoiser makes of a text."""

    source: int
    target: int
    both: int
    """Sum of both, where the sum is largest."""


class Denoiser(Part, abc.ABC):
    """Base of the objectives that make a source and a target of a text."""

    @abc.abstractmethod
    def apply(self, ids: Ints, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        """Return source and target of a text.

        Args:
            ids: Its token ids, at least one, without the end-of-text token.
            vocabulary: Sentinels and other special tokens.
            rng: Source of all random choices.
        """

    def check(self, vocabulary: Vocabulary, max_length: int) -> None:
        """Refuse a vocabulary that lacks tokens which texts of up to ``max_length`` tokens need.

        Args:
            vocabulary: Facts about the tokenizer.
            max_length: Tokens of the longest text.
        """

    @abc.abstractmethod
    def sizes(self, length: int) -> Sizes:
        """Return the most tokens of source and target of a text, without end-of-text tokens.

        Args:
            length: Tokens of the text.
        """

    def longest_text(self, max_length: int, *, target_follows: bool = False) -> int:
        """Return the tokens of the longest text that fits, with an end-of-text token after source and target each.

        Args:
            max_length: Most tokens of a source, and of a target.
            target_follows: Source and target share a row, and only the target has an end-of-text token.

        Raises:
            ConfigurationError: If not even a text of two tokens fits.
        """

        def fits(length: int) -> bool:
            sizes = self.sizes(length)
            return (sizes.both if target_follows else max(sizes.source, sizes.target)) < max_length

        low, high = 1, 4 * max_length
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        if low < 2 or not fits(low):
            raise ConfigurationError(f"max_length={max_length} is too short for {self}; use at least 8.")
        return low


class _Counts(NamedTuple):
    noise: int
    spans: int


def span_counts(length: int, rate: float, mean_span: float) -> _Counts:
    """Return the number of removed tokens, at least one and not all, and of the spans that they form.

    Args:
        length: Tokens of the text.
        rate: Fraction of them to remove.
        mean_span: Mean length of a span, in tokens.
    """
    noise = max(1, min(int(length * rate + 0.5), length - 1))
    kept = length - noise
    return _Counts(noise, max(1, min(int(noise / mean_span + 0.5), noise, kept)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption(Denoiser, limits={"rate": Limit.INSIDE_ONE, "mean_span": Limit.POSITIVE}):
    """Remove spans; the source has a sentinel for each, the target the sentinels with what they stand for.

    The text begins with a kept token and ends with a removed one, as in T5.

    Args:
        rate: Fraction of the tokens to remove.
        mean_span: Mean length of a span, in tokens; at least 1.
        mode: Special token in front of the source (UL2); ``None`` for none.

    Raises:
        ConfigurationError: If the rate is not between 0 and 1, or spans are shorter than a token.

    Source:
        Raffel et al. 2020, arXiv:1910.10683, sections 3.1.4 and 3.3.4.
    """

    rate: float = 0.15
    mean_span: float = 3.0
    mode: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean_span < 1:
            raise ConfigurationError(f"mean_span={self.mean_span} is shorter than a token; use at least 1, such as 3.")

    def apply(self, ids: Ints, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        """Return source and target of a text."""
        noise, spans = span_counts(len(ids), self.rate, self.mean_span)
        vocabulary.require_sentinels(spans)
        lengths = np.stack([_parts(len(ids) - noise, spans, rng), _parts(noise, spans, rng)], axis=1)
        ends = lengths.ravel().cumsum()
        source, target = [], []
        for index in range(spans):
            kept = ids[ends[2 * index - 1] if index else 0 : ends[2 * index]]
            removed = ids[ends[2 * index] : ends[2 * index + 1]]
            sentinel = vocabulary.sentinels[index : index + 1]
            source += [kept, sentinel]
            target += [sentinel, removed]
        return Example(np.concatenate([_mode(self.mode, vocabulary), *source]), np.concatenate(target))

    def check(self, vocabulary: Vocabulary, max_length: int) -> None:
        """Refuse a vocabulary without enough sentinels, or without the mode's token."""
        vocabulary.require_sentinels(span_counts(max_length, self.rate, self.mean_span).spans)
        _mode(self.mode, vocabulary)

    def sizes(self, length: int) -> Sizes:
        """Return the tokens of source and target of a text, without end-of-text tokens."""
        noise, spans = span_counts(length, self.rate, self.mean_span)
        mode = int(self.mode is not None)
        return Sizes(length - noise + spans + mode, noise + spans, length + 2 * spans + mode)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM(Denoiser, limits={"rate": Limit.INSIDE_ONE}):
    """Cut a text in two: the first part is the source, the second the target.

    Args:
        rate: Fraction of the tokens that are target, at least one of them; ``None`` for a uniformly random place.
        mode: Special token in front of the source (UL2); ``None`` for none.

    Source:
        Liu et al. 2018, arXiv:1801.10198; Raffel et al. 2020, arXiv:1910.10683, section 3.2.3.
    """

    rate: float | None = None
    mode: str | None = None

    def apply(self, ids: Ints, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        """Return source and target of a text; the target has at least one token."""
        drawn = int(rng.integers(1, max(len(ids), 2)))
        target = drawn if self.rate is None else self._target(len(ids))
        cut = len(ids) - target
        return Example(np.concatenate([_mode(self.mode, vocabulary), ids[:cut]]), ids[cut:])

    def check(self, vocabulary: Vocabulary, max_length: int) -> None:  # noqa: ARG002
        """Refuse a vocabulary without the mode's token."""
        _mode(self.mode, vocabulary)

    def sizes(self, length: int) -> Sizes:
        """Return the most tokens of source and target of a text, without end-of-text tokens."""
        mode = int(self.mode is not None)
        if self.rate is None:
            return Sizes(length - 1 + mode, max(length - 1, 1), length + mode)
        target = self._target(length)
        return Sizes(length - target + mode, target, length + mode)

    def _target(self, length: int) -> int:
        assert self.rate is not None
        return max(1, min(int(self.rate * length + 0.5), length - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillInTheMiddle(Denoiser, limits={"rate": Limit.FRACTION, "suffix_first": Limit.FRACTION}):
    """Move a random middle part of a text to its end, so that a causal model learns to insert. All of it is target.

    Args:
        rate: Fraction of the texts that are reordered.
        suffix_first: Fraction of these in the order suffix, prefix, middle; the others are prefix, suffix, middle.
        prefix_token: Special token before the prefix.
        suffix_token: Special token before the suffix.
        middle_token: Special token before the middle.

    Source:
        Bavarian et al. 2022, arXiv:2207.14255, section 3 (token-level cuts).
    """

    rate: float = 0.5
    suffix_first: float = 0.5
    prefix_token: str = "<|fim_prefix|>"
    suffix_token: str = "<|fim_suffix|>"
    middle_token: str = "<|fim_middle|>"

    def apply(self, ids: Ints, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        """Return an empty source, and the text in its new order."""
        drawn = rng.random(2)
        first, last = np.sort(rng.integers(0, len(ids) + 1, size=2)).tolist()
        before, middle, after = ids[:first], ids[first:last], ids[last:]
        if drawn[0] >= self.rate:
            return Example(ids[:0], ids)
        prefix_id, suffix_id, middle_id = (np.array([vocabulary.id_of(name)]) for name in self._tokens())
        if drawn[1] < self.suffix_first:
            reordered = [prefix_id, suffix_id, after, middle_id, before, middle]
        else:
            reordered = [prefix_id, before, suffix_id, after, middle_id, middle]
        return Example(ids[:0], np.concatenate(reordered))

    def check(self, vocabulary: Vocabulary, max_length: int) -> None:  # noqa: ARG002
        """Refuse a vocabulary without the three tokens."""
        for name in self._tokens():
            vocabulary.id_of(name)

    def sizes(self, length: int) -> Sizes:
        """Return the most tokens of the target, which is all of the text here."""
        return Sizes(0, length + 3, length + 3)

    def _tokens(self) -> tuple[str, str, str]:
        return self.prefix_token, self.suffix_token, self.middle_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoisers(Denoiser, limits={"weights": Limit.NON_NEGATIVE}):
    """One of several denoisers for each text, at random.

    Args:
        parts: The denoisers.
        weights: Relative frequency of each; ``None`` for equal ones.

    Raises:
        ConfigurationError: If there is no part, or not one weight for each.
    """

    parts: tuple[Denoiser, ...] = dataclasses.field(kw_only=False)
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts or (
            self.weights is not None and (len(self.weights) != len(self.parts) or not sum(self.weights))
        ):
            raise ConfigurationError(
                f"{len(self.parts)} denoisers have weights={self.weights}; give one weight for each, not all 0, or "
                "None for equal ones."
            )

    def apply(self, ids: Ints, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        """Return source and target by a denoiser that is drawn."""
        weights = np.ones(len(self.parts)) if self.weights is None else np.array(self.weights)
        chosen = int(rng.choice(len(self.parts), p=weights / weights.sum()))
        return self.parts[chosen].apply(ids, vocabulary, rng)

    def check(self, vocabulary: Vocabulary, max_length: int) -> None:
        """Refuse a vocabulary that lacks tokens of one of the denoisers."""
        for part in self.parts:
            part.check(vocabulary, max_length)

    def sizes(self, length: int) -> Sizes:
        """Return the most tokens of source and target of a text, without end-of-text tokens."""
        return Sizes(*(max(sizes) for sizes in zip(*(part.sizes(length) for part in self.parts), strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UL2(Denoiser):
    """UL2's mixture: two regular, four extreme and one sequential denoiser, equally often.

    Args:
        regular: Mode token of the regular ones, which remove 15 % in spans of 3 or 8 tokens; ``None`` for none.
        sequential: Mode token of the sequential one, whose target is the last quarter; ``None`` for none.
        extreme: Mode token of the extreme ones, which remove half in spans of 3, 8 or 64 tokens, or 15 % in spans of
            64; ``None`` for none.

    Source:
        Tay et al. 2022, arXiv:2205.05131, table 1.
    """

    regular: str | None = "[R]"
    sequential: str | None = "[S]"
    extreme: str | None = "[X]"

    @property
    def mixture(self) -> Denoisers:
        """The denoisers."""
        spans = [SpanCorruption(mean_span=span, mode=self.regular) for span in (3.0, 8.0)]
        spans += [SpanCorruption(rate=0.5, mean_span=span, mode=self.extreme) for span in (3.0, 8.0, 64.0)]
        long = SpanCorruption(mean_span=64.0, mode=self.extreme)
        return Denoisers((*spans, long, PrefixLM(rate=0.25, mode=self.sequential)))

    def apply(self, ids: Ints, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        """Return source and target by a denoiser that is drawn."""
        return self.mixture.apply(ids, vocabulary, rng)

    def check(self, vocabulary: Vocabulary, max_length: int) -> None:
        """Refuse a vocabulary that lacks tokens of one of the denoisers."""
        self.mixture.check(vocabulary, max_length)

    def sizes(self, length: int) -> Sizes:
        """Return the most tokens of source and target of a text, without end-of-text tokens."""
        return self.mixture.sizes(length)


def _mode(token: str | None, vocabulary: Vocabulary) -> Ints:
    return np.array([] if token is None else [vocabulary.id_of(token)], dtype=np.int64)


def _parts(total: int, count: int, rng: np.random.Generator) -> Ints:
    """Return a random composition: ``count`` numbers, at least 1 each if there are enough, whose sum is ``total``."""
    if total < count:
        return np.array([total], dtype=np.int64)  # a text of one token, all of which is removed
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1 if count > 1 else np.array([], dtype=np.int64)
    return np.diff(cuts, prepend=0, append=total)

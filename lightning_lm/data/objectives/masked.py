"""Masked language modelling: some tokens of a row are hidden, and predicted at their own places from both sides.

Devlin et al. 2019, arXiv:1810.04805: exactly ``max(1, round(rate * n))`` of a row's n ordinary tokens are targets; of
these 80 % become the mask token, 10 % a random ordinary token, 10 % stay. Tokens are chosen one by one, in whole words,
or in spans (SpanBERT). Everything is a pure function of the row and of a generator that seed, row and epoch determine.
"""

import abc
import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_lm.data.objectives.vocabulary import Vocabulary
from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Limit, Part
from lightning_lm.types import IGNORE_INDEX

__all__ = ["MaskedLM", "MaskedRow", "MaskedSpans", "MaskedUnits", "SingleTokens", "WholeWords", "number_of_targets"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class MaskedRow(NamedTuple):
    """A row to hide tokens of."""

    ids: Ints
    """Token ids, [seq]."""
    candidates: Bools
    """True for tokens that may be hidden, [seq]."""
    documents: Ints
    """Equal inside a document, [seq]."""


def number_of_targets(num_candidates: int, rate: float) -> int:
    """Return ``max(1, round(rate * n))``, halves rounded up; 0 if there is no candidate.

    Args:
        num_candidates: Ordinary tokens of the row.
        rate: Fraction of them to predict.
    """
    return min(num_candidates, max(1, int(rate * num_candidates + 0.5)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedUnits(Part, abc.ABC):
    """Base of the units in which tokens are hidden."""

    @abc.abstractmethod
    def choose(self, row: MaskedRow, count: int, vocabulary: Vocabulary, rng: np.random.Generator) -> Bools:
        """Return True for each token that becomes a target, [seq].

        Args:
            row: The row.
            count: Most targets.
            vocabulary: Starts of words.
            rng: Source of all random choices.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleTokens(MaskedUnits):
    """Each token by itself."""

    def choose(self, row: MaskedRow, count: int, vocabulary: Vocabulary, rng: np.random.Generator) -> Bools:  # noqa: ARG002
        """Return ``count`` random candidates."""
        chosen = np.zeros(len(row.ids), dtype=np.bool_)
        chosen[rng.choice(np.flatnonzero(row.candidates), count, replace=False)] = True
        return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeWords(MaskedUnits):
    """Words as a whole, in random order; those that no longer fit into the number of targets are passed over."""

    def choose(self, row: MaskedRow, count: int, vocabulary: Vocabulary, rng: np.random.Generator) -> Bools:
        """Return whole words of at most ``count`` tokens together; a part of one if even the shortest is longer."""
        words = words_of(row, vocabulary)
        sizes = np.bincount(words, minlength=words.max() + 1)
        left, taken = count, np.zeros(len(sizes), dtype=np.bool_)
        for word in rng.permutation(np.unique(words)).tolist():
            if sizes[word] <= left:
                taken[word], left = True, left - sizes[word]
            if not left:
                break
        chosen = np.zeros(len(row.ids), dtype=np.bool_)
        places = np.flatnonzero(row.candidates)
        if left == count:
            chosen[places[:count]] = True
        else:
            chosen[places] = taken[words]
        return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedSpans(MaskedUnits, limits={"p": Limit.INSIDE_ONE, "longest": Limit.COUNT}):
    """Contiguous spans that begin with a word, of geometric length; the last one is cut to the number of targets.

    Args:
        p: Parameter of the geometric distribution: lengths average about ``1 / p`` tokens.
        longest: Longest span, in tokens; longer draws are cut.

    Source:
        Joshi et al. 2020, arXiv:1907.10529, section 3.1 (lengths there count words).
    """

    p: float = 0.2
    longest: int = 10

    def choose(self, row: MaskedRow, count: int, vocabulary: Vocabulary, rng: np.random.Generator) -> Bools:
        """Return spans of ``count`` tokens together."""
        places, words = np.flatnonzero(row.candidates), words_of(row, vocabulary)
        firsts = np.flatnonzero(np.diff(words, prepend=-1))
        chosen = np.zeros(len(row.ids), dtype=np.bool_)
        left = count
        for first in rng.permutation(firsts).tolist():
            length = min(int(rng.geometric(self.p)), self.longest, left)
            span = _contiguous(places[first : first + length], row.documents)
            left -= int((~chosen[span]).sum())
            chosen[span] = True
            if not left:
                return chosen
        rest = places[~chosen[places]]  # short words, all begun already
        chosen[rest[:left]] = True
        return chosen


def words_of(row: MaskedRow, vocabulary: Vocabulary) -> Ints:
    """Return the word of each candidate, non-decreasing; words end at special tokens and documents.

    Args:
        row: The row.
        vocabulary: Starts of words.
    """
    begins = vocabulary.starts_word[row.ids] | ~row.candidates
    begins[1:] |= ~row.candidates[:-1] | (row.documents[1:] != row.documents[:-1])
    begins[:1] = True
    words: Ints = begins.cumsum()[row.candidates]
    return words


def _contiguous(places: Ints, documents: Ints) -> Ints:
    """Return the places up to the first gap or the end of the document."""
    breaks = (np.diff(places) != 1) | (np.diff(documents[places]) != 0)
    return places[: int(breaks.argmax()) + 1] if breaks.any() else places


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(Part, limits={"hidden": Limit.FRACTION, "random": Limit.FRACTION}):
    """Predict hidden tokens from both sides.

    Args:
        rate: Fraction of a row's ordinary tokens that are targets: 0.15 in BERT, 0.3 in ModernBERT.
        units: Units in which tokens are chosen: `SingleTokens`, `WholeWords` or `MaskedSpans`.
        hidden: Fraction of the targets that become the mask token.
        random: Fraction of the targets that become a random ordinary token; the rest stay as they are.

    Raises:
        ConfigurationError: If the rate is not between 0 and 1, or the fractions exceed 1 together.
    """

    rate: float = 0.15
    units: MaskedUnits = SingleTokens()
    hidden: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            loss = "nothing would be predicted" if self.rate <= 0 else "nothing would be left to predict from"
            raise ConfigurationError(
                f"rate={self.rate} of a masked language model: {loss}. Use a fraction between 0 and 1, such as 0.15."
            )
        super().__post_init__()
        if self.hidden + self.random > 1:
            raise ConfigurationError(
                f"hidden={self.hidden} and random={self.random} are fractions of the same targets and add up to more "
                "than 1; lower one of them."
            )

    def apply(self, row: MaskedRow, vocabulary: Vocabulary, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Return the inputs and labels of a row; a label stands at the place of its token.

        Args:
            row: Row of tokens; without candidates it has no targets.
            vocabulary: Mask token and ordinary ids.
            rng: Source of all random choices.
        """
        count = number_of_targets(int(row.candidates.sum()), self.rate)
        inputs, labels = row.ids.copy(), np.full_like(row.ids, IGNORE_INDEX)
        if count:
            places = np.flatnonzero(self.units.choose(row, count, vocabulary, rng))
            labels[places] = row.ids[places]
            drawn = rng.random(len(places))
            replaced = drawn < self.hidden + self.random
            inputs[places[replaced]] = rng.choice(vocabulary.ordinary, int(replaced.sum()))
            inputs[places[drawn < self.hidden]] = vocabulary.mask_id
        return inputs, labels

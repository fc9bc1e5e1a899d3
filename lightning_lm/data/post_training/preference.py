"""Preferences as rows of tokens: a prompt with two completions, the first preferred to the other."""

import dataclasses
import functools
import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_lm.data.permutation import key_of, permute
from lightning_lm.data.post_training.chat import ChatTemplate, encode_pair
from lightning_lm.data.post_training.examples import Examples, ExampleSource
from lightning_lm.data.post_training.forms import Record, by_content, label_of, unknown_form
from lightning_lm.data.post_training.implicit_prompts import split_preference
from lightning_lm.data.post_training.written_special import writes_special, written_special_report
from lightning_lm.data.records import BadRecords
from lightning_lm.errors import ConfigurationError, DataError, TokenizerError
from lightning_lm.parts import Part
from lightning_lm.protocols import Tokenizer
from lightning_lm.types import IGNORE_INDEX

__all__ = ["EncodedPair", "PairCounts", "PairRows", "PairStream", "PreferencePairs", "encode_preference"]

Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairRows(Part):
    """Encoding of pairs as rows of tokens.

    Args:
        max_length: Most tokens of prompt and answer together.
        too_long: Policy for a pair with a longer row: left out, or cut at its end. A completion that was cut gets no
            end of sequence, so that it does not teach to stop in the middle.
        steps_sorted: Optimizer steps whose pairs are sorted by length and redistributed, so that rows of like length
            meet and little is padded. 1 leaves the order as it was drawn.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    max_length: int = 1024
    too_long: Literal["drop", "truncate"] = "drop"
    steps_sorted: int = 1

    def __post_init__(self) -> None:
        if self.max_length < 2 or self.steps_sorted < 1:
            raise ConfigurationError(
                f"max_length={self.max_length} must be at least 2, a prompt and a completion, and "
                f"steps_sorted={self.steps_sorted} at least 1."
            )


class EncodedPair(NamedTuple):
    """Token ids of a preference. Both completions continue the very same prompt ids."""

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    """The preferred completion, with the end of sequence unless it was cut."""
    rejected_ids: Sequence[int]
    margin: float
    """Margin of the preferred completion, if the data has one; in units of reward."""
    is_cut: bool
    """True if a completion does not fit."""


@dataclasses.dataclass
class PairCounts:
    """Counts of used, cut and dropped records.

    Args:
        kept: Pairs to learn from.
        cut: Pairs kept although a completion was cut.
        too_long: Pairs left out because of their length.
        same: Pairs left out because their completions are equal, perhaps only once cut, or one has no token.
        bad: Records left out because they cannot be used.
        written_special: Records in which a special token stands as text, and is encoded as its characters.
    """

    kept: int = 0
    cut: int = 0
    too_long: int = 0
    same: int = 0
    bad: int = 0
    written_special: int = 0

    def report(self, max_length: int) -> str | None:
        """Return what was lost, in words; nothing where nothing was.

        Args:
            max_length: The limit that was set. Tokens.
        """
        losses = [
            (self.cut, f"{self.cut:,} were cut to {max_length:,} tokens"),
            (self.too_long, f"{self.too_long:,} longer than {max_length:,} tokens were dropped"),
            (self.same, f"{self.same:,} with equal completions, or an empty one, were dropped"),
            (self.bad, f"{self.bad:,} were dropped because they cannot be used"),
        ]
        said = [words for count, words in losses if count]
        total = self.kept + self.too_long + self.same + self.bad
        parts = [f"Of {total:,} pairs {', '.join(said)}."] if said else []
        if self.written_special:
            parts.append(written_special_report(self.written_special))
        return " ".join(parts) or None


def encode_preference(record: Record, tokenizer: Tokenizer, template: ChatTemplate, max_length: int) -> EncodedPair:
    """Return the ids of a preference.

    Prompt and completions are tokenized apart, as generation sees them; so no merge reaches over the border, and both
    completions follow the same ids. A completion of several turns counts as a whole.

    Args:
        record: Has ``chosen`` and ``rejected``, and may have ``prompt`` and ``margin``; see `data.post_training.forms`.
        tokenizer: Gives the ids.
        template: Chat template, renders conversations as text.
        max_length: Most tokens of prompt and answer together.

    Raises:
        DataError: If the record is no preference, or its completions are the same.
    """
    record = by_content(record)
    if record.get("chosen") is None or record.get("rejected") is None:
        if label_of(record) is not None and record.get("completion") is not None:
            raise DataError(
                "It has one completion with a label, and a preference needs two: 'chosen' and 'rejected'. Train on "
                "such records with KTO (recipe kto/reverse): --model KTOModule --data UnpairedDataModule"
            )
        raise unknown_form(record, "a preference: it needs 'chosen' and 'rejected'", ("preference",))
    template = template.for_record(record)
    prompt, chosen, rejected = split_preference(record)
    prompt_ids, chosen_ids, chosen_cut = encode_pair(prompt, chosen, tokenizer, template, max_length)
    other_prompt_ids, rejected_ids, rejected_cut = encode_pair(prompt, rejected, tokenizer, template, max_length)
    # a template may write the prompt for a completion according to the completion, such as <think> before thoughts only
    same = [one == other for one, other in zip(prompt_ids, other_prompt_ids, strict=False)]
    shared = same.index(False) if False in same else len(same)
    chosen_ids, rejected_ids = prompt_ids[shared:] + chosen_ids, other_prompt_ids[shared:] + rejected_ids
    prompt_ids = prompt_ids[:shared]
    return EncodedPair(prompt_ids, chosen_ids, rejected_ids, _margin(record), chosen_cut or rejected_cut)


def _margin(record: Record) -> float:
    margin = 0.0 if record.get("margin") is None else record["margin"]
    if not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError(f"margin is {margin!r}; a finite number is needed.")
    return float(margin)


class PreferencePairs:
    """Encoded pairs, kept in memory in 4 bytes a token.

    Args:
        pairs: In the order of their numbers.

    Attributes:
        counts: What became of the records; only ``kept`` where pairs were not made by `from_records`.
        margins: float32 [pairs].
        pad_id: What fills up rows. It is never looked at: what is padding is told by the labels.
    """

    def __init__(self, pairs: Iterable[EncodedPair]) -> None:
        tokens, ends, margins = array("I"), array("q"), array("f")
        for pair in pairs:
            for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
                tokens.extend(ids)
                ends.append(len(tokens))
            margins.append(pair.margin)
        self._tokens = np.array(tokens, dtype=np.uint32)
        self._ends = np.array(ends, dtype=np.int64).reshape(-1, 3)
        self.margins = np.array(margins, dtype=np.float32)
        self.counts = PairCounts(kept=len(self.margins))
        self.pad_id = 0

    @classmethod
    def from_records(
        cls, records: ExampleSource | Iterable[Record], tokenizer: Tokenizer, template: ChatTemplate, rows: PairRows
    ) -> "PreferencePairs":
        """Encode records and leave out what cannot be learned from; `counts` says how many.

        Args:
            records: Preferences, or their source.
            tokenizer: Gives the ids.
            template: Chat template, renders conversations as text.
            rows: The limit, and what becomes of pairs beyond it.

        Raises:
            DataError: If a record is no preference, or no pair is left.
        """
        counts = PairCounts()
        source = records if isinstance(records, ExampleSource) else Examples(source=records)
        bad = source.policy()
        pairs = cls(_usable(source, bad, tokenizer, template, rows, counts))
        counts.bad = bad.count
        bad.report("the preferences")
        pairs.counts, pairs.pad_id = counts, tokenizer.eos_id or 0
        if not counts.kept:
            raise DataError(f"There is no pair to learn from. {counts.report(rows.max_length) or 'No record came.'}")
        return pairs

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.margins)

    def __getitem__(self, number: int) -> tuple[Ints, Ints, Ints]:
        """Return the ids of prompt, preferred and other completion, int64."""
        first = int(self._ends[number - 1, 2]) if number else 0
        ends = [first, *self._ends[number].tolist()]
        prompt, chosen, rejected = (self._tokens[ends[part] : ends[part + 1]].astype(np.int64) for part in range(3))
        return prompt, chosen, rejected

    @functools.cached_property
    def lengths(self) -> Ints:
        """Tokens of the longer row of each pair."""
        sizes = np.diff(self._ends.ravel(), prepend=0).reshape(-1, 3)
        return np.asarray(sizes[:, 0] + sizes[:, 1:].max(axis=1, initial=0), dtype=np.int64)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of all ids and margins."""
        digest = hashlib.sha256()
        for values in (self._tokens, self._ends, self.margins):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def rows(self, numbers: Ints) -> dict[str, NDArray[Any]]:
        """Return pairs as a `lightning_lm.types.PairBatch`, padded on the right to the longest of these rows.

        Args:
            numbers: Indices of the pairs.
        """
        half = len(numbers)
        width = int(self.lengths[numbers].max())
        input_ids = np.full((2 * half, width), self.pad_id, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        lengths = np.zeros(2 * half, dtype=np.int64)
        for place, number in enumerate(numbers.tolist()):
            prompt, *answers = self[number]
            for row, answer in zip((place, place + half), answers, strict=True):
                start, end = len(prompt), len(prompt) + len(answer)
                input_ids[row, :start], input_ids[row, start:end] = prompt, answer
                labels[row, start:end], lengths[row] = answer, end
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": np.broadcast_to(np.arange(width), input_ids.shape).copy(),
            "lengths": lengths,
            "margin": self.margins[numbers],
            "pair_ids": numbers.copy(),
        }


def _usable(
    source: ExampleSource,
    bad: BadRecords,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    rows: PairRows,
    counts: PairCounts,
) -> Iterable[EncodedPair]:
    for place, record in source.placed(bad):
        if record.get("chosen") is not None and record.get("chosen") == record.get("rejected"):
            counts.same += 1
            continue
        try:
            pair = encode_preference(record, tokenizer, template, rows.max_length)
        except (DataError, TokenizerError) as error:
            refused = DataError(f"{place}: {error}")
            refused.__cause__ = error
            bad.add(refused)
            continue
        counts.written_special += writes_special(record, tokenizer, template)
        is_empty = not (len(pair.chosen_ids) and len(pair.rejected_ids))
        if pair.is_cut and (rows.too_long == "drop" or is_empty):
            counts.too_long += 1
        elif is_empty or list(pair.chosen_ids) == list(pair.rejected_ids):
            counts.same += 1
        else:
            counts.kept += 1
            counts.cut += pair.is_cut
            yield pair


class PairStream:
    """Pairs epoch after epoch, each epoch in a new order: pair ``i`` is a pure function of the pairs, seed and ``i``.

    Args:
        pairs: Encoded pairs.
        seed: Seed of the order.
        shuffle: False keeps the order of the pairs.
        step_size: Pairs of an optimizer step.
        steps_sorted: As in `PairRows`.
        first_id: Number of the first pair in ``pair_ids``.
    """

    def __init__(
        self,
        pairs: PreferencePairs,
        *,
        seed: int = 0,
        shuffle: bool = True,
        step_size: int = 1,
        steps_sorted: int = 1,
        first_id: int = 0,
    ) -> None:
        self._pairs, self._seed, self._shuffle, self._first_id = pairs, seed, shuffle, first_id
        self._step_size, self._steps_sorted = step_size, steps_sorted
        self._sorted: tuple[int, int, Ints] | None = None
        self.rows_per_epoch = len(pairs)

    @functools.cached_property
    def description(self) -> dict[str, object]:
        """Everything that decides the pairs, by name; two streams are equal if and only if these are equal."""
        order = {"step_size": self._step_size, "steps_sorted": self._steps_sorted} if self._steps_sorted > 1 else {}
        return {"pairs": self._pairs.fingerprint, "seed": self._seed, "shuffle": self._shuffle, **order}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of `description`."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def batch(self, indices: Ints) -> dict[str, NDArray[Any]]:
        """Return the pairs with these places in the endless order, as a `lightning_lm.types.PairBatch`.

        Args:
            indices: At least 0.
        """
        batch = self._pairs.rows(self.locate(indices))
        batch["pair_ids"] += self._first_id
        return batch

    def locate(self, indices: Ints) -> Ints:
        """Return the number of the pair at each place.

        Args:
            indices: At least 0.
        """
        epochs, places = np.divmod(indices, self.rows_per_epoch)
        if not self._shuffle:
            return places
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            numbers[inside] = self._shuffled(epoch, places[inside])
        return numbers

    def _shuffled(self, epoch: int, places: Ints) -> Ints:
        if self._steps_sorted == 1:
            return permute(places, self.rows_per_epoch, key_of("pairs", self._seed, epoch))
        blocks, within = np.divmod(places, self._step_size * self._steps_sorted)
        numbers = np.empty_like(places)
        for block in np.unique(blocks).tolist():
            inside = blocks == block
            numbers[inside] = self._sorted_block(epoch, block)[within[inside]]
        return numbers

    def _sorted_block(self, epoch: int, block: int) -> Ints:
        """Return a block of shuffled pairs, sorted by length into steps, the steps in random order."""
        if self._sorted is not None and self._sorted[:2] == (epoch, block):
            return self._sorted[2]
        size, step = self._step_size * self._steps_sorted, self._step_size
        key = key_of("pairs", self._seed, epoch)
        places = np.arange(block * size, min((block + 1) * size, self.rows_per_epoch))
        numbers = permute(places, self.rows_per_epoch, key)
        numbers = numbers[np.argsort(self._pairs.lengths[numbers], kind="stable")]
        whole = len(numbers) // step
        order = permute(np.arange(whole), whole, key_of(key, block)) if whole else np.arange(0)
        steps = numbers[: whole * step].reshape(whole, step)[order]
        numbers = np.concatenate([steps.ravel(), numbers[whole * step :]])
        self._sorted = epoch, block, numbers
        return numbers
